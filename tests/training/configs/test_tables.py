from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.model_config import KeepRatioResize
from training.configs import get_config
from training.configs.schema import PAPER_MASK_WEIGHTS, Config
from training.configs.tables import TABLES, get_table


def configs(key: str, base: str | None = None) -> dict[str, Config]:
    table = get_table(key)
    start = get_config(base or table.base)
    return {row.name: row.change(start) for row in table.rows}


@pytest.mark.parametrize("key", sorted(TABLES))
@pytest.mark.parametrize("base", [None, "nuclei_ablation"])
def test_every_row_is_another_configuration(key: str, base: str | None) -> None:
    found = list(configs(key, base).values())
    for i, config in enumerate(found):
        assert config not in found[:i]


@pytest.mark.parametrize("key", ["2", "3", "4", "5", "align", "decoupled"])
def test_each_ablation_has_the_papers_model_among_its_rows(key: str) -> None:
    base = get_config("solo_r50")
    rows = get_table(key).rows
    same = [row for row in rows if row.change(base) == base]
    assert len(same) == 1 and same[0].paper["AP"] == 35.8


def test_the_papers_numbers() -> None:
    told = {
        key: [row.paper.get("AP") for row in get_table(key).rows] for key in ("1", "2", "3", "4")
    }
    assert told == {
        "1": [36.8, 37.8, 40.4],
        "2": [27.2, 29.0, 28.6, 35.8],
        "3": [32.2, 35.8, 35.7, 35.8],
        "4": [30.0, 31.6, 35.8],
    }


def test_what_the_rows_change() -> None:
    single = configs("2")["single level S=36"].model
    assert single.neck == "single" and single.head.num_grids == (36,)
    coords = [c.model.head.num_coord_convs for c in configs("3").values()]
    assert coords == [0, 1, 2, 3]
    weights = {c.loss.mask_loss: c.loss.effective_mask_weight for c in configs("4").values()}
    assert weights == PAPER_MASK_WEIGHTS == {"dice": 3, "bce": 10, "focal": 20}
    assert [c.model.head.num_convs for c in configs("5").values()] == [4, 5, 6, 7, 8]
    aligned = {c.model.head.align for c in configs("align").values()}
    assert aligned == {"interpolate", "adaptive_max_pool", "region_grid"}
    assert configs("decoupled")["decoupled"].model.head.kind == "decoupled"


def test_the_six_times_rows() -> None:
    for config in (*configs("1").values(), *configs("6").values()):
        assert (config.schedule.epochs, config.schedule.milestones) == (72, (54, 66))
    dcn = configs("1")["SOLO R-DCN-101"].model.backbone
    assert dcn.depth == 101 and dcn.deformable_stages == (2, 3, 4)
    small = configs("6")["SOLO-512 R101"]
    assert small.input.resize == KeepRatioResize(short_side=512, long_side=852)
    zoo = get_config("solo_512_r101")
    assert replace(small, name=zoo.name, description=zoo.description) == zoo


def test_an_unknown_table_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no table '9'; there are 1, 2, 3, 4, 5, 6, align"):
        get_table("9")
