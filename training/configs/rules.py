"""Self-configuration: from numbers of a data set and a machine to a configuration, with reasons.

A pure function of rules, in the manner of nnU-Net (Isensee et al., Nature Methods 18, 2021): the
data set is reduced to a few statistics, and every field follows from them or is fixed. The rules
of grids and scale ranges follow SOLO's own reasoning (arXiv 1912.04488, section 3.1: two objects
of one image rarely share a cell; table 2: ranges that overlap by a factor of two). Numbers that
are fixed are those of the bundled configurations, measured in docs/experiments.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pipeline.model_config import (
    ContrastSpec,
    InputSpec,
    KeepRatioResize,
    MatrixNms,
    PostprocessSpec,
    TileResize,
)
from training.configs.grids import (
    CanvasObjects,
    nearest_neighbours,
    place_objects,
    share_without_cell,
)
from training.configs.nuclei import NUCLEI
from training.configs.schema import (
    AugmentConfig,
    BackboneConfig,
    BackboneKind,
    Config,
    HeadConfig,
    LossConfig,
    NetworkConfig,
    ScheduleConfig,
    TargetConfig,
)
from training.configs.statistics import DataStatistics, Machine

SMALL_OBJECT_PX = 16
"""Size on the canvas that nine of ten objects should have: four mask pixels at stride 4, so that
the published area filter (more mask pixels than the level's stride) keeps them."""
ACCEPTED_LOSS = 0.01
"""Share of objects without a cell up to which grids are not made finer."""
GRID_FACTORS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0)
CELLS_PER_OBJECT = 5
"""Least number of cells along the largest objects of a level (published: 4 to 5)."""
LEVEL_STRIDES = (8, 8, 16, 32, 32)
MAX_STEPS = 20_000
FEW_STEPS = 200
"""Below this number, training has hardly begun (measured in docs/your-own-data.md)."""
PLANNED_SHARE = 0.85
"""Share of the time budget that the steps may take; validation and checkpoints take the rest."""
LOW_CONTRAST = 200
"""Median intensity range below which images are stretched to the full range."""


@dataclass(frozen=True, kw_only=True)
class ConfigPlan:
    """A configuration, the reasons of its fields in lines, and the share of lost objects."""

    config: Config
    reasons: tuple[str, ...]
    lost_share: float


def default_init(config: Config) -> Literal["imagenet"] | None:
    """Initial weights of a self-configured network: frozen statistics require trained ones."""
    return "imagenet" if config.model.backbone.norm == "frozen_bn" else None


def choose_config(
    name: str,
    data: DataStatistics,
    machine: Machine,
    init: Config | BackboneKind | Literal["imagenet"] | None = None,
) -> ConfigPlan:
    """The configuration of a data set; its schedule is for `fit_schedule` to set.

    Args:
        name: Of the configuration, and of the model that is exported from it.
        data: Statistics of the training split.
        machine: The device decides the size of the network and of the canvas.
        init: A trained model, whose network and canvas are taken; or the backbone of which there
            are weights; `imagenet`: one with ImageNet weights; None: that too, except on a CPU for
            grey images or without the weights of EfficientNet-Lite0, where a narrow backbone starts
            from random weights.

    Raises:
        ValueError: The data has no objects.
    """
    sizes = data.sizes
    if not len(sizes):
        raise ValueError("the training images have no objects, so nothing can be configured")
    pretrained = init if isinstance(init, Config) else None
    base = pretrained or _base(machine, _choose_backbone(data, machine, init))
    spec, reasons = _choose_input(data, _bounds(machine, pretrained))
    canvases = [canvas for image in data.sample for canvas in place_objects(image, spec)]
    if pretrained:
        head = base.model.head
        lost = share_without_cell(canvases, head, TargetConfig().centre_scale)
        grids = ", ".join(map(str, head.num_grids))
        why = [f"grids: {grids}, those of the trained model: {lost:.1%} of the objects get no cell"]
    else:
        head, lost, why = _choose_head(base.model.head, canvases)
    reasons += why
    candidates, most, why = _choose_limits(data, canvases)
    reasons += why
    augment, why = _choose_augmentation(data, spec)
    reasons += why
    config = replace(
        base,
        name=name,
        description=f"self-configured from {data.num_images} images",
        model=replace(base.model, head=head, candidates=candidates, mask_threshold=0.5),
        targets=TargetConfig(mask_resize="area"),
        loss=LossConfig(),
        augment=augment,
        input=spec,
        postprocess=PostprocessSpec(nms=MatrixNms(), score_threshold=0.3, max_instances=most),
        num_classes=data.num_classes,
    )
    reasons.append(_explain_network(config, machine, data, pretrained))
    return ConfigPlan(config=config, reasons=tuple(reasons), lost_share=lost)


def _explain_network(
    config: Config, machine: Machine, data: DataStatistics, pretrained: Config | None
) -> str:
    backbone = config.model.backbone
    name, width = f"ResNet-{backbone.depth}", 64
    if backbone.kind == "efficientnet_lite0":
        name, width = "EfficientNet-Lite0", 32
    name += f", {backbone.base_width} channels" if backbone.base_width != width else ""
    network = f"network: {name}, {config.model.head.kind} head"
    if pretrained:
        return f"{network}, those of {pretrained.name}"
    device = "a GPU" if machine.gpu else f"{machine.cores} CPU cores"
    weights = "ImageNet weights"
    if default_init(config) is None:
        cause = "the images are grey" if data.grey else "those of EfficientNet-Lite0 are missing"
        weights = f"random weights, because {cause}"
    return f"{network}, for {device}; {weights}"


def _choose_backbone(
    data: DataStatistics,
    machine: Machine,
    init: Config | BackboneKind | Literal["imagenet"] | None,
) -> BackboneKind | None:
    """The backbone with trained weights; None: a narrow one with random weights."""
    if init == "resnet" or init == "efficientnet_lite0":
        return init
    if machine.gpu:
        return "resnet"
    if init is None and (data.grey or not machine.efficientnet):
        return None
    return "efficientnet_lite0" if machine.efficientnet else "resnet"


def _base(machine: Machine, kind: BackboneKind | None) -> Config:
    """Network and optimisation for a machine; the head's levels are only its first values."""
    backbone = BackboneConfig(depth=50 if machine.gpu else 18)
    if kind == "efficientnet_lite0":
        backbone = BackboneConfig(kind=kind, base_width=32)
    if machine.gpu:
        return Config(
            name="gpu",
            model=NetworkConfig(backbone=backbone, head=HeadConfig(kind="decoupled")),
            schedule=ScheduleConfig(schedule="cosine", ema_decay=0.998),
        )
    if kind is None:
        return NUCLEI
    return replace(NUCLEI, model=replace(NUCLEI.model, backbone=backbone))


def _bounds(machine: Machine, pretrained: Config | None) -> tuple[int, int]:
    """Side of a tile's canvas, and the largest short side of a whole image, px."""
    if pretrained is None:
        return (512, 800) if machine.gpu else (288, 320)
    resize = pretrained.input.resize
    side = min(resize.canvas_hw) if isinstance(resize, TileResize) else resize.short_side
    return side, side


def _choose_input(data: DataStatistics, bounds: tuple[int, int]) -> tuple[InputSpec, list[str]]:
    sizes = tuple(float(p) for p in np.percentile(data.sizes, (10, 50, 99)))
    sides = np.sort([image.image_hw for image in data.sample], axis=1)
    short, long = (int(side) for side in np.median(sides, axis=0))
    summary = (
        f"data: {data.num_images} images of {short}x{long} px (median), "
        f"{'grey' if data.grey else 'colour'}, {data.bits} bits, {data.num_classes} classes; "
        f"{len(data.sizes)} objects inspected of {'/'.join(f'{size:.0f}' for size in sizes)} px "
        "(percentiles 10/50/99)"
    )
    resize, reason = _choose_tiles(data, sizes[0], sizes[2], bounds[0]) or _choose_whole(
        data, sizes[0], sizes[2], bounds[1]
    )
    if data.intensity_range >= LOW_CONTRAST:
        return InputSpec(resize=resize), [summary, reason]
    stretched = (
        f"contrast: stretched, because images use {data.intensity_range:.0f} of 255 grey levels"
    )
    contrast = ContrastSpec(low=0.5, high=99.8, min_range=16)
    return InputSpec(resize=resize, contrast=contrast), [summary, reason, stretched]


def _choose_tiles(
    data: DataStatistics, small: float, large: float, canvas: int
) -> tuple[TileResize, str] | None:
    """Tiles at a fixed scale, if the largest objects fit twice into an image and a tile."""
    sides = np.asarray([image.image_hw for image in data.sample])
    least, most = SMALL_OBJECT_PX / max(small, 1), canvas / (2 * large)
    if least > most or 2 * large > np.median(sides.min(axis=1)):
        return None
    scale = min(max(1.0, math.ceil(least * 4) / 4), most)
    overlap = max(8, round(float(np.percentile(data.sizes, 90)) / 8) * 8)
    enough = math.ceil((int(sides.max()) + overlap) * scale / 32) * 32
    canvas = max(96, min(canvas // 32 * 32, enough))
    tile = max(1, round(canvas / scale))
    resize = TileResize(
        scale=canvas / tile, tile_hw=(tile, tile), overlap_px=min(overlap, tile // 3)
    )
    return resize, (
        f"input: tiles of {tile} px shown at {resize.scale:.3g}x, overlap {resize.overlap_px} px: "
        f"a tenth of the objects is below {small:.0f} px, and 99% fit twice into a tile"
    )


def _choose_whole(
    data: DataStatistics, small: float, large: float, limit: int
) -> tuple[KeepRatioResize, str]:
    """Whole images at their own resolution, or larger for small objects, within bounds."""
    sides = np.sort([image.image_hw for image in data.sample], axis=1)
    wanted = float(np.median(sides[:, 0])) * max(1.0, SMALL_OBJECT_PX / max(small, 1))
    side = max(min(128, limit), min(limit, math.ceil(wanted / 32) * 32))
    ratio = min(float(np.percentile(sides[:, 1] / sides[:, 0], 95)), 2.0)
    bound = "" if wanted <= limit else f", bounded at {limit} px for this network and machine"
    reason = (
        f"input: whole images, short side {side} px{bound}: 1% of the objects exceed "
        f"{large:.0f} px, too large beside those of {small:.0f} px for tiles"
    )
    return KeepRatioResize(short_side=side, long_side=math.ceil(side * ratio / 32) * 32), reason


def _choose_head(
    base: HeadConfig, canvases: Sequence[CanvasObjects]
) -> tuple[HeadConfig, float, list[str]]:
    """Levels, scale ranges, and the coarsest grids in which few objects share a cell."""
    sizes = np.concatenate([canvas.sizes for canvas in canvases])
    side = float(np.median([canvas.canvas_wh.min() for canvas in canvases]))
    bound = 48.0 if side <= 512 else 96.0
    bounds = [bound]
    while len(bounds) < 4 and bounds[-1] < np.percentile(sizes, 99):
        bounds.append(bounds[-1] * 2)
    ranges = tuple(
        (1.0 if i == 0 else high / 4, 2048.0 if i == len(bounds) - 1 else high)
        for i, high in enumerate(bounds)
    )
    strides = LEVEL_STRIDES[: len(ranges)]
    finest = max(1, int(side // strides[0]))
    coarsest = min(finest, max(8, min(12, int(side // 32))))
    largest = float(np.percentile(sizes, 99))
    wanted = [
        max(
            _neighbour_grid(canvases, low, high),
            side * CELLS_PER_OBJECT / min(high, max(largest, bounds[0])),
        )
        for low, high in ranges
    ]
    heads = []
    for factor in GRID_FACTORS:
        grids = [round(min(max(grid * factor, coarsest), finest)) for grid in wanted]
        grids = [max(grids[i:]) for i in range(len(grids))]  # finer levels have no coarser grid
        head = replace(
            base,
            num_grids=tuple(grids),
            level_strides=strides,
            mask_strides=tuple(stride // 2 for stride in strides),
            scale_ranges=ranges,
        )
        heads.append((share_without_cell(canvases, head, TargetConfig().centre_scale), head))
    least = min(lost for lost, _ in heads)
    lost, head = next(h for h in heads if h[0] <= max(ACCEPTED_LOSS, least + ACCEPTED_LOSS / 2))
    reason = (
        f"grids: {', '.join(map(str, head.num_grids))} for objects of "
        + ", ".join(f"{low:.0f}-{high:.0f}" for low, high in ranges)
        + f" px on the canvas: {lost:.1%} of the objects get no cell"
        + (f" ({least:.1%} with the finest grids)" if lost > ACCEPTED_LOSS else "")
    )
    return head, lost, [reason]


def _neighbour_grid(canvases: Sequence[CanvasObjects], low: float, high: float) -> float:
    """S at which a cell is as wide as the distance that 95% of a level's neighbours exceed."""
    apart = [nearest_neighbours(c, (c.sizes >= low) & (c.sizes <= high)) for c in canvases]
    distances = np.concatenate([np.empty(0), *apart])
    return 1 / max(float(np.percentile(distances, 5)), 1e-3) if len(distances) else 1.0


def _choose_limits(
    data: DataStatistics, canvases: Sequence[CanvasObjects]
) -> tuple[int, int, list[str]]:
    """Candidates per canvas and instances per image."""
    on_canvas = max(len(canvas.centres_xy) for canvas in canvases)
    in_image = int(data.objects_per_image.max())
    candidates = min(max(100, math.ceil(on_canvas * 2.5 / 50) * 50), 1000)
    most = max(100, math.ceil(in_image * 1.5 / 100) * 100)
    reason = (
        f"limits: {candidates} candidates for up to {on_canvas} objects on a canvas, "
        f"{most} instances for up to {in_image} in an image"
    )
    return candidates, most, [reason]


def _choose_augmentation(data: DataStatistics, spec: InputSpec) -> tuple[AugmentConfig, list[str]]:
    tiles = isinstance(spec.resize, TileResize)
    invert = 0.1 if data.grey and 0.02 <= data.bright_share <= 0.98 else 0.0
    augment = AugmentConfig(
        brightness=0.1,
        contrast=0.2,
        gamma=0.3 if data.grey or spec.contrast else 0.0,
        invert=invert,
        dihedral=tiles,
    )
    if isinstance(spec.resize, KeepRatioResize):
        side = spec.resize.short_side
        augment = replace(augment, short_sides=(round(side * 0.8), side))
    else:
        augment = replace(augment, scale_jitter=(0.8, 1.25))
    turns = "flips and quarter turns, since tiles have no upright orientation"
    changes = [turns if tiles else "horizontal flips", "scale from 0.8", "brightness and contrast"]
    changes += ["inversion, since backgrounds are dark and bright"] if invert else []
    return augment, [f"augmentation: {'; '.join(changes)}"]


def fit_schedule(
    plan: ConfigPlan, num_images: int, *, budget_s: float, step_s: float
) -> ConfigPlan:
    """Sets epochs, warm-up and the average of the weights for a time budget.

    Args:
        plan: Of `choose_config`.
        num_images: Images of the training split.
        budget_s: Time for the whole training.
        step_s: Measured time of a training step of this configuration.

    Raises:
        ValueError: A time is not positive.
    """
    for name, seconds in (("budget", budget_s), ("time of a step", step_s)):
        if not 0 < seconds < math.inf:
            raise ValueError(f"the {name} is {seconds} s, expected a positive time")
    schedule = plan.config.schedule
    per_epoch = max(1, num_images // schedule.batch_size)
    affordable = budget_s * PLANNED_SHARE / step_s
    epochs = max(1, int(min(affordable, MAX_STEPS) / per_epoch))
    steps = epochs * per_epoch
    schedule = replace(
        schedule,
        epochs=epochs,
        milestones=(),
        warmup_steps=min(schedule.warmup_steps, math.ceil(steps / 10)),
        ema_decay=min(schedule.ema_decay, max(0.9, 1 - 10 / steps)),
    )
    reason = (
        f"schedule: {epochs} epochs, {steps} steps of {schedule.batch_size} images at {step_s:.2f} "
        f"s for {budget_s / 3600:.2g} hours; {schedule.optimizer}, rate {schedule.lr:g}, cosine"
    )
    if steps < FEW_STEPS:
        reason += f"; fewer than {FEW_STEPS} steps are seldom enough"
    if affordable < per_epoch:
        reason += f"; one epoch takes {per_epoch * step_s / 3600:.2g} hours, more than the budget"
    config = replace(plan.config, schedule=schedule)
    return replace(plan, config=config, reasons=(*plan.reasons, reason))
