from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model_config import KeepRatioResize, TileResize
from training.configs import get_config
from training.configs.grids import place_objects, share_without_cell
from training.configs.io import config_from_dict, config_to_dict
from training.configs.nuclei import NUCLEI
from training.configs.rules import (
    ACCEPTED_LOSS,
    FEW_STEPS,
    MAX_STEPS,
    PLANNED_SHARE,
    SMALL_OBJECT_PX,
    choose_config,
    default_init,
    fit_schedule,
)
from training.configs.schema import BackboneKind, Config
from training.configs.statistics import DataStatistics, ImageObjects, Machine

CPU, GPU = Machine(gpu=False, cores=2), Machine(gpu=True)
LITE = replace(CPU, efficientnet=True)


def lattice(side: int, apart: int, size: float, *, height: int, width: int) -> ImageObjects:
    """`side` x `side` squares of `size` px whose centres are `apart` px from each other."""
    centres = (np.arange(side) + 0.5) * apart
    x, y = (axis.ravel() for axis in np.meshgrid(centres, centres))
    boxes = np.stack([x - size / 2, y - size / 2, *np.full((2, len(x)), size)], axis=1)
    return ImageObjects(image_hw=(height, width), boxes_xywh=boxes)


def statistics(*images: ImageObjects, **more: object) -> DataStatistics:
    fields = {"num_images": len(images), "num_classes": 3, **more}
    return DataStatistics(sample=images, **fields)  # type: ignore[arg-type]


CELLS = statistics(lattice(20, 16, 10, height=320, width=320), grey=True, intensity_range=90)
SCENES = statistics(
    lattice(3, 160, 60, height=480, width=640), lattice(1, 480, 450, height=480, width=640)
)


def test_small_objects_are_magnified_in_tiles() -> None:
    resize = choose_config("a", CELLS, CPU).config.input.resize
    assert isinstance(resize, TileResize)
    assert resize.scale * 10 >= SMALL_OBJECT_PX
    assert resize.overlap_px >= 8 and resize.tile_hw[0] > 2 * 10


def test_large_objects_are_seen_whole() -> None:
    resize = choose_config("a", SCENES, CPU).config.input.resize
    assert isinstance(resize, KeepRatioResize)
    assert resize.short_side % 32 == 0 and resize.long_side / resize.short_side >= 640 / 480
    larger = choose_config("a", SCENES, GPU).config.input.resize
    assert isinstance(larger, KeepRatioResize) and larger.short_side >= resize.short_side


def test_a_long_image_does_not_make_a_huge_canvas() -> None:
    strip = statistics(lattice(1, 100, 90, height=100, width=60_000))
    resize = choose_config("a", strip, GPU).config.input.resize
    if isinstance(resize, KeepRatioResize):
        assert resize.long_side <= 2 * resize.short_side
    else:
        assert max(resize.canvas_hw) <= 512


def test_denser_objects_get_finer_grids() -> None:
    def coarsest(apart: int) -> int:
        data = statistics(lattice(600 // apart, apart, 150, height=600, width=600))
        return choose_config("a", data, GPU).config.model.head.num_grids[-1]

    assert coarsest(30) > coarsest(200)


def test_the_share_without_a_cell_is_that_of_the_chosen_head() -> None:
    for data in (CELLS, SCENES):
        plan = choose_config("a", data, CPU)
        config = plan.config
        canvases = [c for image in data.sample for c in place_objects(image, config.input)]
        share = share_without_cell(canvases, config.model.head, config.targets.centre_scale)
        assert plan.lost_share == share <= ACCEPTED_LOSS
        assert any(f"{share:.1%} of the objects get no cell" in line for line in plan.reasons)


def test_objects_that_no_grid_separates_are_reported() -> None:
    one = lattice(1, 200, 20, height=200, width=200)
    twice = ImageObjects(image_hw=(200, 200), boxes_xywh=np.repeat(one.boxes_xywh, 4, axis=0))
    plan = choose_config("a", statistics(twice), CPU)
    assert plan.lost_share == 0.75
    assert any("75.0% of the objects get no cell (75.0% with" in line for line in plan.reasons)


def test_whole_images_have_levels_for_objects_of_all_sizes() -> None:
    config = choose_config("a", SCENES, GPU).config
    assert isinstance(config.input.resize, KeepRatioResize)
    assert config.input.resize.short_side == 480
    head = config.model.head
    assert (head.level_strides, head.mask_strides) == ((8, 8, 16, 32), (4, 4, 8, 16))
    assert head.scale_ranges == ((1, 48), (24, 96), (48, 192), (96, 2048))


def test_whole_images_are_enlarged_until_objects_of_one_pixel_are_seen() -> None:
    boxes = np.array([(2.0 * i, 0, 1, 1) for i in range(9)] + [(2.0, 2, 17, 17)])
    resize = choose_config(
        "a", statistics(ImageObjects(image_hw=(20, 20), boxes_xywh=boxes)), GPU
    ).config.input.resize
    assert isinstance(resize, KeepRatioResize)
    assert resize.short_side == 20 * SMALL_OBJECT_PX


def test_candidates_are_five_halves_of_the_objects_in_steps_of_fifty() -> None:
    few = lattice(10, 40, 30, height=400, width=400).boxes_xywh
    boxes = np.concatenate([few, np.tile((20.0, 20.0, 350.0, 350.0), (2, 1))])
    config = choose_config(
        "a", statistics(ImageObjects(image_hw=(400, 400), boxes_xywh=boxes)), GPU
    ).config
    assert isinstance(config.input.resize, KeepRatioResize)  # so all are on one canvas
    assert config.model.candidates == 300 and config.postprocess.max_instances == 200


def test_limits_follow_the_most_crowded_image() -> None:
    crowd, few = (
        lattice(30, 10, 8, height=300, width=300),
        lattice(2, 40, 20, height=300, width=300),
    )
    config = choose_config("a", statistics(crowd, few), CPU).config
    assert config.postprocess.max_instances >= 900
    assert 100 <= config.model.candidates <= 1000
    small = choose_config("a", statistics(few), CPU).config
    assert (small.model.candidates, small.postprocess.max_instances) == (100, 100)


def test_intensities() -> None:
    dull = choose_config("a", CELLS, CPU).config
    assert dull.input.contrast is not None
    bright = choose_config("a", replace(CELLS, intensity_range=250), CPU)
    assert bright.config.input.contrast is None
    assert not any(line.startswith("contrast") for line in bright.reasons)
    assert dull.augment.invert > 0
    for change in ({"grey": False}, {"bright_share": 0.0}, {"bright_share": 1.0}):
        data = replace(CELLS, **change)
        assert choose_config("a", data, CPU).config.augment.invert == 0


def test_only_tiles_are_turned() -> None:
    assert choose_config("a", CELLS, CPU).config.augment.dihedral
    scene = choose_config("a", SCENES, CPU).config
    assert not scene.augment.dihedral
    assert isinstance(scene.input.resize, KeepRatioResize)
    assert scene.augment.short_sides[1] == scene.input.resize.short_side


def test_the_machine_decides_the_network() -> None:
    cpu, gpu = (choose_config("a", SCENES, machine).config for machine in (CPU, GPU))
    assert (cpu.model.backbone.depth, gpu.model.backbone.depth) == (18, 50)
    assert (default_init(cpu), default_init(gpu)) == (None, "imagenet")


def test_imagenet_weights_need_the_full_width() -> None:
    backbone = choose_config("a", SCENES, CPU, "imagenet").config.model.backbone
    assert (backbone.depth, backbone.base_width, backbone.norm) == (18, 64, "frozen_bn")
    assert choose_config("a", SCENES, GPU, "imagenet") == choose_config("a", SCENES, GPU)


@pytest.mark.parametrize(
    ("data", "machine", "init", "kind"),
    [
        (SCENES, LITE, None, "efficientnet_lite0"),
        (SCENES, LITE, "imagenet", "efficientnet_lite0"),
        (SCENES, LITE, "resnet", "resnet"),
        (CELLS, LITE, "imagenet", "efficientnet_lite0"),
        (SCENES, CPU, "efficientnet_lite0", "efficientnet_lite0"),
        (SCENES, GPU, "efficientnet_lite0", "efficientnet_lite0"),
        (SCENES, replace(GPU, efficientnet=True), None, "resnet"),
    ],
)
def test_the_backbone_with_trained_weights(
    data: DataStatistics, machine: Machine, init: BackboneKind | None, kind: str
) -> None:
    plan = choose_config("a", data, machine, init)
    backbone = plan.config.model.backbone
    width = {"efficientnet_lite0": 32, "resnet": 64}[kind]
    assert (backbone.kind, backbone.base_width, backbone.norm) == (kind, width, "frozen_bn")
    assert default_init(plan.config) == "imagenet"
    name = {"efficientnet_lite0": "EfficientNet-Lite0", "resnet": "ResNet-"}[kind]
    assert f"network: {name}" in plan.reasons[-1] and "ImageNet weights" in plan.reasons[-1]


@pytest.mark.parametrize(
    ("data", "machine", "cause"),
    [
        (CELLS, LITE, "the images are grey"),
        (CELLS, CPU, "the images are grey"),
        (SCENES, CPU, "those of EfficientNet-Lite0 are missing"),
    ],
)
def test_why_weights_are_random(data: DataStatistics, machine: Machine, cause: str) -> None:
    plan = choose_config("a", data, machine)
    assert plan.config.model.backbone == NUCLEI.model.backbone
    assert plan.reasons[-1].endswith(f"random weights, because {cause}")


@pytest.mark.parametrize("data", [CELLS, SCENES])
@pytest.mark.parametrize("name", ["nuclei", "decoupled_solo_light_r50"])
def test_a_trained_model_keeps_its_network_and_canvas(data: DataStatistics, name: str) -> None:
    trained = get_config(name)
    config = choose_config("a", data, CPU, trained).config
    assert replace(config.model, candidates=trained.model.candidates) == trained.model
    resize, theirs = config.input.resize, trained.input.resize
    side = theirs.canvas_hw[0] if isinstance(theirs, TileResize) else theirs.short_side
    largest = max(resize.canvas_hw) if isinstance(resize, TileResize) else resize.short_side
    assert largest <= side
    assert (config.name, config.num_classes) == ("a", 3)


def test_a_trained_model_of_contours_learns_regions() -> None:
    config = choose_config("a", CELLS, CPU, get_config("nuclei_contour")).config
    assert config.task == "segmentation" and config.loss.mask_loss == "dice"
    assert config.model.mask_threshold == config.postprocess.mask_threshold == 0.5


def test_the_reasons_are_about_ten_lines() -> None:
    for data in (CELLS, SCENES):
        plan = fit_schedule(choose_config("a", data, CPU), 100, budget_s=3600, step_s=2)
        assert 6 <= len(plan.reasons) <= 10 and all("\n" not in line for line in plan.reasons)


def test_data_without_objects_is_refused() -> None:
    empty = ImageObjects(image_hw=(9, 9), boxes_xywh=np.zeros((0, 4)))
    for data in (statistics(empty), statistics()):
        with pytest.raises(ValueError, match="no objects"):
            choose_config("a", data, CPU)


def test_the_schedule_fills_the_budget() -> None:
    plan = choose_config("a", CELLS, CPU)
    schedule = fit_schedule(plan, 80, budget_s=1000, step_s=0.5).config.schedule
    seconds = schedule.epochs * (80 // schedule.batch_size) * 0.5
    assert 1000 * PLANNED_SHARE - 5 < seconds <= 1000 * PLANNED_SHARE
    assert schedule.warmup_steps <= seconds / 0.5 / 10
    assert schedule.schedule == "cosine" and schedule.milestones == ()


def test_a_long_budget_is_bounded_and_a_short_one_is_one_epoch() -> None:
    plan = choose_config("a", CELLS, CPU)
    long = fit_schedule(plan, 800, budget_s=1e9, step_s=0.01).config.schedule
    assert long.epochs * (800 // long.batch_size) <= MAX_STEPS
    short = fit_schedule(plan, 800, budget_s=1, step_s=1)
    assert short.config.schedule.epochs == 1
    assert "more than the budget" in short.reasons[-1]
    assert 0.9 <= short.config.schedule.ema_decay < long.ema_decay


@pytest.mark.parametrize(("steps", "few"), [(FEW_STEPS - 10, True), (FEW_STEPS, False)])
def test_too_few_steps_are_named(steps: int, few: bool) -> None:
    plan = choose_config("a", CELLS, CPU)
    images = 10 * plan.config.schedule.batch_size
    fitted = fit_schedule(plan, images, budget_s=(steps + 1) / PLANNED_SHARE, step_s=1)
    assert f"{steps} steps of" in fitted.reasons[-1]
    assert (f"fewer than {FEW_STEPS} steps" in fitted.reasons[-1]) is few


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf")])
def test_times_that_are_not_positive_are_refused(bad: float) -> None:
    plan = choose_config("a", CELLS, CPU)
    with pytest.raises(ValueError, match=rf"budget is {bad} s"):
        fit_schedule(plan, 10, budget_s=bad, step_s=1)
    with pytest.raises(ValueError, match=rf"step is {bad} s"):
        fit_schedule(plan, 10, budget_s=1, step_s=bad)


BOX = st.tuples(*(st.floats(0, 5000) for _ in range(2)), *(st.floats(0.01, 5000) for _ in range(2)))
IMAGE = st.builds(
    lambda hw, boxes: ImageObjects(
        image_hw=hw, boxes_xywh=np.asarray(boxes, np.float64).reshape(-1, 4)
    ),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.lists(BOX, max_size=8),
)


@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(IMAGE, min_size=1, max_size=4),
    gpu=st.booleans(),
    grey=st.booleans(),
    intensity_range=st.floats(0, 255),
)
def test_any_data_gives_a_valid_configuration(
    images: list[ImageObjects], gpu: bool, grey: bool, intensity_range: float
) -> None:
    data = statistics(*images, grey=grey, intensity_range=intensity_range)
    if not len(data.sizes):
        return
    config: Config = choose_config("a", data, Machine(gpu=gpu)).config
    assert config_from_dict(config_to_dict(config)) == config
    head, resize = config.model.head, config.input.resize
    if isinstance(resize, TileResize):
        assert all(side % 32 == 0 for side in resize.canvas_hw) and max(resize.canvas_hw) <= 512
    assert list(head.num_grids) == sorted(head.num_grids, reverse=True) and head.num_grids[-1] >= 1
    for (_, high), (low, _) in zip(head.scale_ranges, head.scale_ranges[1:], strict=False):
        assert low < high
    assert (head.scale_ranges[0][0], head.scale_ranges[-1][1]) == (1, 2048)
