"""Every row of every table against version 1 of the paper: numbers, schedule, split, network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from pipeline.model_config import KeepRatioResize
from training.configs import get_config
from training.configs.io import config_to_dict
from training.configs.recipes import apply_recipe
from training.configs.schema import PAPER_MASK_WEIGHTS, Config
from training.configs.tables import TABLES, get_table, refuse_overrides

SIX = ("AP", "AP50", "AP75", "APs", "APm", "APl")
VANILLA = dict(zip(SIX, (35.8, 57.1, 37.8, 15.0, 38.7, 53.6), strict=True))


@dataclass(frozen=True)
class Expected:
    """A row of the paper: its numbers, and the fields that differ from `solo_r50`."""

    paper: dict[str, float]
    fields: dict[str, Any]


def numbers(*values: float, names: tuple[str, ...] = SIX) -> dict[str, float]:
    return dict(zip(names, values, strict=True))


def single(grid: int) -> dict[str, Any]:
    return {
        "model.neck": "single",
        "model.head.num_grids": [grid],
        "model.head.level_strides": [8],
        "model.head.mask_strides": [4],
        "model.head.scale_ranges": [[1, 2048]],
    }


LONG = {"schedule.epochs": 72, "schedule.milestones": [54, 66]}
DEEP = {**LONG, "model.backbone.depth": 101}
SMALL = {
    "input.resize.short_side": 512,
    "input.resize.long_side": 852,
    "augment.short_sides": [352, 512],
}
FPS = ("AP", "AP50", "AP75", "fps")
PAPER: dict[str, tuple[str, str, dict[str, Expected]]] = {
    "1": (
        "test-dev",
        "6x",
        {
            "SOLO R50": Expected(numbers(36.8, 58.6, 39.0, 15.9, 39.5, 52.1), LONG),
            "SOLO R101": Expected(numbers(37.8, 59.5, 40.4, 16.4, 40.6, 54.2), DEEP),
            "SOLO R-DCN-101": Expected(
                numbers(40.4, 62.7, 43.3, 17.6, 43.3, 58.9),
                {**DEEP, "model.backbone.deformable_stages": [2, 3, 4]},
            ),
        },
    ),
    "2": (
        "val2017",
        "3x",
        {
            "single level S=12": Expected({"AP": 27.2}, single(12)),
            "single level S=24": Expected({"AP": 29.0}, single(24)),
            "single level S=36": Expected({"AP": 28.6}, single(36)),
            "pyramid": Expected(VANILLA, {}),
        },
    ),
    "4": (
        "val2017",
        "3x",
        {
            "0 CoordConvs": Expected({"AP": 32.2}, {"model.head.num_coord_convs": 0}),
            "1 CoordConv": Expected(VANILLA, {}),
            "2 CoordConvs": Expected({"AP": 35.7}, {"model.head.num_coord_convs": 2}),
            "3 CoordConvs": Expected({"AP": 35.8}, {"model.head.num_coord_convs": 3}),
        },
    ),
    "5": (
        "val2017",
        "3x",
        {
            "BCE": Expected({"AP": 30.0}, {"loss.mask_loss": "bce"}),
            "focal": Expected({"AP": 31.6}, {"loss.mask_loss": "focal"}),
            "Dice": Expected(VANILLA, {}),
        },
    ),
    "figure5": (
        "val2017",
        "3x",
        {
            "4 convolutions": Expected({}, {"model.head.num_convs": 4}),
            "5 convolutions": Expected({}, {"model.head.num_convs": 5}),
            "6 convolutions": Expected({}, {"model.head.num_convs": 6}),
            "7 convolutions": Expected(VANILLA, {}),
            "8 convolutions": Expected({}, {"model.head.num_convs": 8}),
        },
    ),
    "6": (
        "val2017",
        "6x",
        {
            "SOLO R50": Expected(numbers(36.0, 57.5, 38.0, 12.1, names=FPS), LONG),
            "SOLO R101": Expected(numbers(37.1, 58.7, 39.4, 10.4, names=FPS), DEEP),
            "SOLO-512 R50": Expected(numbers(34.2, 55.9, 36.0, 22.5, names=FPS), {**LONG, **SMALL}),
            "SOLO-512 R101": Expected(
                numbers(35.0, 57.1, 37.0, 19.2, names=FPS), {**DEEP, **SMALL}
            ),
        },
    ),
    "7": (
        "val2017",
        "3x",
        {
            "vanilla": Expected(VANILLA, {}),
            "decoupled": Expected(
                numbers(35.8, 57.2, 37.7, 16.3, 39.1, 52.2), {"model.head.kind": "decoupled"}
            ),
        },
    ),
    "align": (
        "val2017",
        "3x",
        {
            "interpolation": Expected(VANILLA, {}),
            "adaptive max-pool": Expected({}, {"model.head.align": "adaptive_max_pool"}),
            "region-grid interpolation": Expected({}, {"model.head.align": "region_grid"}),
        },
    ),
}


def changed(config: Config, base: Config) -> dict[str, Any]:
    def fields(content: dict[str, Any], path: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in content.items():
            if isinstance(value, dict):
                found |= fields(value, f"{path}{name}.")
            else:
                found[path + name] = value
        return found

    before, after = fields(config_to_dict(base)), fields(config_to_dict(config))
    return {name: value for name, value in after.items() if before[name] != value}


def test_the_tables_are_those_of_version_1() -> None:
    assert list(PAPER) == ["1", "2", "4", "5", "figure5", "6", "7", "align"]
    assert set(TABLES) == set(PAPER)
    assert [get_table(key).heading.partition(":")[0] for key in PAPER] == [
        *("Table 1", "Table 2", "Table 4", "Table 5", "Figure 5", "Table 6", "Table 7"),
        "Section 4.3",
    ]


@pytest.mark.parametrize("key", list(PAPER))
def test_every_row_is_the_papers(key: str) -> None:
    table = get_table(key)
    split, schedule, rows = PAPER[key]
    assert (table.base, table.split, table.schedule) == ("solo_r50", split, schedule)
    assert [row.name for row in table.rows] == list(rows)
    base = get_config("solo_r50")
    for row in table.rows:
        config = row.change(base)
        assert dict(row.paper) == rows[row.name].paper
        assert changed(config, base) == rows[row.name].fields
        assert config.schedule.epochs == {"3x": 36, "6x": 72}[schedule]
        paper = apply_recipe(config, "paper")
        assert (paper.model.recipe, paper.targets.recipe) == ("paper", "paper")
        assert (paper.schedule.lr, paper.schedule.batch_size) == (0.01, 16)


@pytest.mark.parametrize("key", sorted(TABLES))
@pytest.mark.parametrize("base", [None, "nuclei_ablation"])
def test_every_row_is_another_configuration(key: str, base: str | None) -> None:
    table = get_table(key)
    start = get_config(base or table.base)
    found = [row.change(start) for row in table.rows]
    for i, config in enumerate(found):
        assert config not in found[:i]


def test_the_rows_are_the_models_of_the_zoo() -> None:
    base, zoo = get_config("solo_r50"), get_config("solo_512_r101")
    (small,) = (r.change(base) for r in get_table("6").rows if r.name == "SOLO-512 R101")
    assert small.input.resize == KeepRatioResize(short_side=512, long_side=852)
    assert replace(small, name=zoo.name, description=zoo.description) == zoo
    rows = get_table("5").rows
    losses = [row.change(base).loss for row in rows]
    assert {x.mask_loss: x.effective_mask_weight for x in losses} == PAPER_MASK_WEIGHTS
    assert PAPER_MASK_WEIGHTS == {"dice": 3, "bce": 10, "focal": 20}


def test_an_unknown_table_lists_the_known_ones() -> None:
    known = "there are 1, 2, 4, 5, figure5, 6, align, 7"
    for key in ("3", "8", "decoupled"):
        with pytest.raises(ValueError, match=f"no table {key!r} with results; {known}"):
            get_table(key)


@pytest.mark.parametrize(
    ("key", "override", "field"),
    [
        ("4", "model.head.num_coord_convs=1", "model.head.num_coord_convs"),
        ("2", "model.head.num_grids=[9]", "model.head.num_grids"),
        ("6", "input.resize.short_side=300", "input.resize.short_side"),
        ("6", 'input.resize={"rule":"keep_ratio"}', "input.resize.long_side"),
        ("1", "model.backbone.depth=50", "model.backbone.depth"),
    ],
)
def test_a_change_of_what_the_rows_compare_is_refused(key: str, override: str, field: str) -> None:
    base = get_config("solo_r50")
    with pytest.raises(ValueError, match="--set ") as caught:
        refuse_overrides(get_table(key), base, ["schedule.lr=1", override])
    assert override in str(caught.value) and f"changes {field}," in str(caught.value)
    refuse_overrides(get_table(key), base, ["schedule.epochs=1", "model.head.channels=64"])
    # A field whose name only begins with that of another one is another field.
    refuse_overrides(get_table("figure5"), base, ["model.head.num_convs_x=1"])
