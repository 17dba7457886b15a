"""The paper's tables as lists of configurations (arXiv 1912.04488, version 1, section 4).

The keys are the numbers of version 1; later versions number their tables and sections differently.
Table 3 lists the five levels and has no results. A row is a change of a base configuration, so the
same table can be run on COCO with the paper's models (`solo-train --table 4`) and on any data with
a smaller model (`solo-train --table 4 --base nuclei_ablation`). The numbers are mask AP in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.model_config import KeepRatioResize
from training.configs.coco import SHORT_SIDES_512, apply_schedule
from training.configs.io import config_to_dict
from training.configs.schema import Config, MaskLoss

Change = Callable[[Config], Config]


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of a table.

    Attributes:
        name: Name of the row.
        change: Makes the configuration of the row from the base.
        paper: The paper's numbers by COCO metric and `fps`, as far as they are known here.
    """

    name: str
    change: Change
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper.

    Attributes:
        key: Value of `--table`: the paper's number, or `figure5` and `align`.
        title: What it compares.
        rows: The rows.
        split: Split on which the paper's numbers were measured.
        schedule: Name of the paper's schedule.
        note: What the paper says besides the numbers.
        base: Name of the configuration that the rows change.
    """

    key: str
    title: str
    rows: tuple[TableRow, ...]
    split: str = "val2017"
    schedule: str = "3x"
    note: str = ""
    base: str = "solo_r50"

    @property
    def heading(self) -> str:
        """Number and title, such as `Table 4: CoordConvs`."""
        place = {"figure5": "Figure 5", "align": "Section 4.3"}.get(self.key, f"Table {self.key}")
        return f"{place}: {self.title}"


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
    return apply_schedule(config, "6x")


def _short_side_512(config: Config) -> Config:
    return replace(
        config,
        input=config.input.model_copy(
            update={"resize": KeepRatioResize(short_side=512, long_side=852)}
        ),
        augment=replace(config.augment, short_sides=SHORT_SIDES_512),
    )


def _all(*changes: Change) -> Change:
    def change(config: Config) -> Config:
        for each in changes:
            config = each(config)
        return config

    return change


R101 = _backbone(depth=101)
R_DCN_101 = _backbone(depth=101, deformable_stages=(2, 3, 4))
VANILLA = {"AP": 35.8, "AP50": 57.1, "AP75": 37.8, "APs": 15.0, "APm": 38.7, "APl": 53.6}

_TABLES = (
    Table(
        key="1",
        title="main results",
        split="test-dev",
        schedule="6x",
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
        rows=(
            TableRow(name="single level S=12", change=_single_level(12), paper={"AP": 27.2}),
            TableRow(name="single level S=24", change=_single_level(24), paper={"AP": 29.0}),
            TableRow(name="single level S=36", change=_single_level(36), paper={"AP": 28.6}),
            TableRow(name="pyramid", change=_same, paper=VANILLA),
        ),
    ),
    Table(
        key="4",
        title="CoordConvs",
        rows=(
            TableRow(name="0 CoordConvs", change=_head(num_coord_convs=0), paper={"AP": 32.2}),
            TableRow(name="1 CoordConv", change=_head(num_coord_convs=1), paper=VANILLA),
            TableRow(name="2 CoordConvs", change=_head(num_coord_convs=2), paper={"AP": 35.7}),
            TableRow(name="3 CoordConvs", change=_head(num_coord_convs=3), paper={"AP": 35.8}),
        ),
    ),
    Table(
        key="5",
        title="mask loss",
        rows=(
            TableRow(name="BCE", change=_mask_loss("bce"), paper={"AP": 30.0}),
            TableRow(name="focal", change=_mask_loss("focal"), paper={"AP": 31.6}),
            TableRow(name="Dice", change=_mask_loss("dice"), paper=VANILLA),
        ),
    ),
    Table(
        key="figure5",
        title="head depth",
        note="about +1.2 AP from 4 to 7, flat after (read from the text)",
        rows=(
            *(TableRow(name=f"{n} convolutions", change=_head(num_convs=n)) for n in (4, 5, 6)),
            TableRow(name="7 convolutions", change=_head(num_convs=7), paper=VANILLA),
            TableRow(name="8 convolutions", change=_head(num_convs=8)),
        ),
    ),
    Table(
        key="6",
        title="SOLO-512",
        schedule="6x",
        rows=(
            TableRow(
                name="SOLO R50",
                change=_six_times,
                paper={"AP": 36.0, "AP50": 57.5, "AP75": 38.0, "fps": 12.1},
            ),
            TableRow(
                name="SOLO R101",
                change=_all(_six_times, R101),
                paper={"AP": 37.1, "AP50": 58.7, "AP75": 39.4, "fps": 10.4},
            ),
            TableRow(
                name="SOLO-512 R50",
                change=_all(_six_times, _short_side_512),
                paper={"AP": 34.2, "AP50": 55.9, "AP75": 36.0, "fps": 22.5},
            ),
            TableRow(
                name="SOLO-512 R101",
                change=_all(_six_times, R101, _short_side_512),
                paper={"AP": 35.0, "AP50": 57.1, "AP75": 37.0, "fps": 19.2},
            ),
        ),
    ),
    Table(
        key="align",
        title="alignment of the category branch",
        note="all within 0.1 AP of each other (read from the text)",
        rows=(
            TableRow(name="interpolation", change=_head(align="interpolate"), paper=VANILLA),
            TableRow(name="adaptive max-pool", change=_head(align="adaptive_max_pool")),
            TableRow(name="region-grid interpolation", change=_head(align="region_grid")),
        ),
    ),
    Table(
        key="7",
        title="vanilla and decoupled head",
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
    """A table by its key.

    Raises:
        ValueError: There is no such table; lists those that there are.
    """
    if key not in TABLES:
        raise ValueError(f"no table {key!r} with results; there are {', '.join(TABLES)}")
    return TABLES[key]


def refuse_overrides(table: Table, base: Config, overrides: Iterable[str]) -> None:
    """Checks that the command line changes no field that tells the rows of a table apart.

    Args:
        table: The table.
        base: What its rows change.
        overrides: `FIELD=VALUE` each.

    Raises:
        ValueError: Names the override and the field in which the rows differ.
    """
    rows = [dict(_fields(config_to_dict(row.change(base)))) for row in table.rows]
    names = sorted({name for row in rows for name in row})
    varied = [name for name in names if any(row.get(name) != rows[0].get(name) for row in rows)]
    for override in overrides:
        changed = override.partition("=")[0]
        for name in varied:
            if f"{name}.".startswith(f"{changed}.") or f"{changed}.".startswith(f"{name}."):
                raise ValueError(
                    f"--set {override} changes {name}, in which the rows of table {table.key} "
                    "differ"
                )


def _fields(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every field."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{path}{name}.")
        else:
            yield path + name, value
