"""The paper's tables as lists of configurations (arXiv 1912.04488, section 4).

A row is a change of a base configuration, so the same table can be run on COCO with the paper's
models (`solo-train --table 3`) and on any data with a smaller model
(`solo-train --table 3 --base nuclei_ablation`). The numbers are mask AP in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.model_config import InputSpec, KeepRatioResize
from training.configs.schema import Config, MaskLoss

Change = Callable[[Config], Config]


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of a table.

    Attributes:
        name: Name of the row.
        change: Makes the configuration of the row from the base.
        paper: The paper's numbers by COCO metric, as far as it has them.
    """

    name: str
    change: Change
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper.

    Attributes:
        key: Value of `--table`.
        title: What it compares.
        rows: The rows.
        note: Data and schedule of the paper, and what it says besides the numbers.
        base: Name of the configuration that the rows change.
    """

    key: str
    title: str
    rows: tuple[TableRow, ...]
    note: str
    base: str = "solo_r50"


def _same(config: Config) -> Config:
    return config


def _head(**changes: Any) -> Change:
    def change(config: Config) -> Config:
        head = replace(config.model.head, **changes)
        return replace(config, model=replace(config.model, head=head))

    return change


def _backbone(**changes: Any) -> Change:
    def change(config: Config) -> Config:
        backbone = replace(config.model.backbone, **changes)
        return replace(config, model=replace(config.model, backbone=backbone))

    return change


def _single_level(grid: int) -> Change:
    def change(config: Config) -> Config:
        head = replace(
            config.model.head,
            num_grids=(grid,),
            level_strides=(8,),
            mask_strides=(4,),
            scale_ranges=((1, 2048),),
        )
        return replace(config, model=replace(config.model, neck="single", head=head))

    return change


def _mask_loss(kind: MaskLoss) -> Change:
    def change(config: Config) -> Config:
        return replace(config, loss=replace(config.loss, mask_loss=kind, mask_weight=None))

    return change


def _six_times(config: Config) -> Config:
    return replace(config, schedule=replace(config.schedule, epochs=72, milestones=(54, 66)))


def _short_side_512(config: Config) -> Config:
    return replace(
        config,
        input=InputSpec(resize=KeepRatioResize(short_side=512, long_side=852)),
        augment=replace(config.augment, short_sides=(352, 512)),
    )


def _all(*changes: Change) -> Change:
    def change(config: Config) -> Config:
        for each in changes:
            config = each(config)
        return config

    return change


R101 = _backbone(depth=101)
R_DCN_101 = _backbone(depth=101, deformable_stages=(2, 3, 4))
ON_COCO = "3x schedule, val2017"
VANILLA = {"AP": 35.8, "AP50": 57.1, "AP75": 37.8, "APs": 15.0, "APm": 38.7, "APl": 53.6}

_TABLES = (
    Table(
        key="1",
        title="main results",
        note="6x schedule, test-dev",
        rows=(
            TableRow(
                name="SOLO R50",
                change=_six_times,
                paper={
                    "AP": 36.8,
                    "AP50": 58.6,
                    "AP75": 39.0,
                    "APs": 15.9,
                    "APm": 39.5,
                    "APl": 52.1,
                },
            ),
            TableRow(
                name="SOLO R101",
                change=_all(_six_times, R101),
                paper={
                    "AP": 37.8,
                    "AP50": 59.5,
                    "AP75": 40.4,
                    "APs": 16.4,
                    "APm": 40.6,
                    "APl": 54.2,
                },
            ),
            TableRow(
                name="SOLO R-DCN-101",
                change=_all(_six_times, R_DCN_101),
                paper={
                    "AP": 40.4,
                    "AP50": 62.7,
                    "AP75": 43.3,
                    "APs": 17.6,
                    "APm": 43.3,
                    "APl": 58.9,
                },
            ),
        ),
    ),
    Table(
        key="2",
        title="number of grids and the pyramid",
        note=ON_COCO,
        rows=(
            TableRow(name="single level S=12", change=_single_level(12), paper={"AP": 27.2}),
            TableRow(name="single level S=24", change=_single_level(24), paper={"AP": 29.0}),
            TableRow(name="single level S=36", change=_single_level(36), paper={"AP": 28.6}),
            TableRow(name="pyramid", change=_same, paper=VANILLA),
        ),
    ),
    Table(
        key="3",
        title="CoordConvs",
        note=ON_COCO,
        rows=(
            TableRow(name="0 CoordConvs", change=_head(num_coord_convs=0), paper={"AP": 32.2}),
            TableRow(name="1 CoordConv", change=_head(num_coord_convs=1), paper=VANILLA),
            TableRow(name="2 CoordConvs", change=_head(num_coord_convs=2), paper={"AP": 35.7}),
            TableRow(name="3 CoordConvs", change=_head(num_coord_convs=3), paper={"AP": 35.8}),
        ),
    ),
    Table(
        key="4",
        title="mask loss",
        note=ON_COCO,
        rows=(
            TableRow(name="BCE", change=_mask_loss("bce"), paper={"AP": 30.0}),
            TableRow(name="focal", change=_mask_loss("focal"), paper={"AP": 31.6}),
            TableRow(name="Dice", change=_mask_loss("dice"), paper=VANILLA),
        ),
    ),
    Table(
        key="5",
        title="head depth",
        note=f"{ON_COCO}; about +1.2 AP from 4 to 7, flat after (read from the text)",
        rows=(
            *(TableRow(name=f"{n} convolutions", change=_head(num_convs=n)) for n in (4, 5, 6)),
            TableRow(name="7 convolutions", change=_head(num_convs=7), paper=VANILLA),
            TableRow(name="8 convolutions", change=_head(num_convs=8)),
        ),
    ),
    Table(
        key="6",
        title="SOLO-512",
        note="6x schedule, val2017",
        rows=(
            TableRow(
                name="SOLO R50",
                change=_six_times,
                paper={"AP": 36.0, "AP50": 57.5, "AP75": 38.0},
            ),
            TableRow(
                name="SOLO R101",
                change=_all(_six_times, R101),
                paper={"AP": 37.1, "AP50": 58.7, "AP75": 39.4},
            ),
            TableRow(
                name="SOLO-512 R50",
                change=_all(_six_times, _short_side_512),
                paper={"AP": 34.2, "AP50": 55.9, "AP75": 36.0},
            ),
            TableRow(
                name="SOLO-512 R101",
                change=_all(_six_times, R101, _short_side_512),
                paper={"AP": 35.0, "AP50": 57.1, "AP75": 37.0},
            ),
        ),
    ),
    Table(
        key="align",
        title="alignment of the category branch",
        note=f"{ON_COCO}; all within 0.1 AP of each other (read from the text)",
        rows=(
            TableRow(name="interpolation", change=_head(align="interpolate"), paper=VANILLA),
            TableRow(name="adaptive max-pool", change=_head(align="adaptive_max_pool")),
            TableRow(name="region-grid interpolation", change=_head(align="region_grid")),
        ),
    ),
    Table(
        key="decoupled",
        title="vanilla and decoupled head",
        note=ON_COCO,
        rows=(
            TableRow(name="vanilla", change=_head(kind="vanilla"), paper=VANILLA),
            TableRow(
                name="decoupled",
                change=_head(kind="decoupled"),
                paper={
                    "AP": 35.8,
                    "AP50": 57.2,
                    "AP75": 37.7,
                    "APs": 16.3,
                    "APm": 39.1,
                    "APl": 52.2,
                },
            ),
        ),
    ),
)
TABLES = {table.key: table for table in _TABLES}


def get_table(key: str) -> Table:
    """A table by its number or name.

    Raises:
        ValueError: There is no such table; lists those that there are.
    """
    if key not in TABLES:
        raise ValueError(f"no table {key!r}; there are {', '.join(TABLES)}")
    return TABLES[key]
