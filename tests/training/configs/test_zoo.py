from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from pipeline.model_config import InputSpec, KeepRatioResize, TileResize
from training.configs import get_config, list_configs
from training.configs.coco import apply_schedule
from training.configs.schema import HeadConfig, ScheduleConfig

PAPER = {
    "solo_r50": (50, "vanilla", 800, 7),
    "solo_r101": (101, "vanilla", 800, 7),
    "solo_512_r50": (50, "vanilla", 512, 7),
    "solo_512_r101": (101, "vanilla", 512, 7),
    "decoupled_solo_r50": (50, "decoupled", 800, 7),
    "decoupled_solo_r101": (101, "decoupled", 800, 7),
    "decoupled_solo_light_r50": (50, "decoupled_light", 512, 4),
    "solo_rdcn101": (101, "vanilla", 800, 7),
    "decoupled_solo_light_dcn_r50": (50, "decoupled_light", 512, 4),
}


def test_the_zoo_holds_the_papers_models_and_the_bundled_one() -> None:
    assert {*PAPER, "nuclei"} <= set(list_configs())
    for name in list_configs():
        assert get_config(name).name == name


@pytest.mark.parametrize("name", sorted(PAPER))
def test_a_model_of_the_paper(name: str) -> None:
    config = get_config(name)
    depth, kind, short_side, convs = PAPER[name]
    head, resize = config.model.head, config.input.resize
    long_side = {800: 1333, 512: 852}[short_side]
    found = (config.model.backbone.depth, head.kind, resize.rule, head.num_convs)
    assert found == (depth, kind, "keep_ratio", convs)
    assert config.input == InputSpec(
        resize=KeepRatioResize(short_side=short_side, long_side=long_side)
    )
    assert list(head.num_grids) == [40, 36, 24, 16, 12]
    assert list(head.level_strides) == [8, 8, 16, 32, 32]
    assert head.scale_ranges[0][1] == (64 if "light" in name else 96)
    assert config.num_classes == 80 and config.schedule.batch_size == 16
    deformable = (2, 3, 4) if "dcn" in name else ()
    assert config.model.backbone.deformable_stages == deformable
    assert head.deformable == (name == "decoupled_solo_light_dcn_r50")
    assert config.schedule.epochs == (72 if "512" in name or "rdcn" in name else 36)


def test_the_bundled_models_grid_fits_its_canvas() -> None:
    config = get_config("nuclei")
    assert isinstance(config.input.resize, TileResize)
    assert all(side % 32 == 0 for side in config.input.resize.canvas_hw)
    assert config.input.contrast is not None


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'solo_r51'.*nuclei.*solo_r50"):
        get_config("solo_r51")


def test_configurations_are_frozen_and_misspelt_fields_fail() -> None:
    config = get_config("nuclei")
    with pytest.raises(FrozenInstanceError):
        config.name = "x"  # type: ignore[misc]
    with pytest.raises(TypeError, match="num_gridz"):
        replace(config.model.head, num_gridz=(1,))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_grids": (8, 4)}, "level_strides has 5 entries, num_grids has 2"),
        ({"num_coord_convs": 9}, "num_coord_convs is 9"),
        ({"scale_ranges": ((1, 2),)}, "scale_ranges has 1 entries"),
        (
            {"num_grids": (), "level_strides": (), "mask_strides": (), "scale_ranges": ()},
            "0 levels",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "epochs", "milestones"),
    [("1x", 12, (8, 11)), ("3x", 36, (27, 33)), ("6x", 72, (54, 66))],
)
def test_a_schedule_changes_its_length_alone(
    name: str, epochs: int, milestones: tuple[int, ...]
) -> None:
    base = get_config("nuclei")
    config = apply_schedule(base, name)
    assert (config.schedule.epochs, config.schedule.milestones) == (epochs, milestones)
    schedule = replace(
        config.schedule, epochs=base.schedule.epochs, milestones=base.schedule.milestones
    )
    assert replace(config, schedule=schedule) == base


def test_another_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule is '2x', expected one of 1x, 3x, 6x"):
        apply_schedule(get_config("nuclei"), "2x")


@pytest.mark.parametrize("field", ["batch_size", "images_per_canvas", "epochs"])
def test_a_schedule_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0, expected at least 1"):
        ScheduleConfig(**{field: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "canvas", "group"), [(16, 2, 2), (5, 2, 1), (1, 2, 1), (6, 4, 2)]
)
def test_images_that_share_a_canvas_divide_the_batch(batch: int, canvas: int, group: int) -> None:
    assert ScheduleConfig(batch_size=batch, images_per_canvas=canvas).canvas_group == group
