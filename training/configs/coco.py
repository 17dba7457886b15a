"""The paper's COCO models (arXiv 1912.04488v1, tables 1, 6 and 7; section 6)."""

from __future__ import annotations

from dataclasses import replace

from pipeline.model_config import InputSpec, KeepRatioResize
from training.configs.contours import as_contours
from training.configs.schema import (
    AugmentConfig,
    BackboneConfig,
    Config,
    HeadConfig,
    NetworkConfig,
    ScheduleConfig,
)

LIGHT_SCALE_RANGES = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))

SHORT_SIDES_512 = (352, 512)
"""Jitter of the models at 512, px: that of Decoupled Light, as no SOLO-512 is published."""
PAPER_SHORT_SIDES_512 = (410, 512)
"""640-800 scaled to 512: the paper says that the other parameters of SOLO-512 are those of SOLO."""

THREE_TIMES = ScheduleConfig(epochs=36, milestones=(27, 33), skip_empty_images=True)
"""The schedule of the paper's ablations."""
ONE_TIMES = replace(THREE_TIMES, epochs=12, milestones=(8, 11))
"""mmdetection's; the milestones of the authors' own 1x are 9 and 11."""
SIX_TIMES = replace(THREE_TIMES, epochs=72, milestones=(54, 66))
"""The schedule of the paper's tables 1 and 6."""
SOLO_R50 = Config(
    name="solo_r50", description="SOLO, ResNet-50, short side 800, 3x", schedule=THREE_TIMES
)
SCHEDULES = {"1x": ONE_TIMES, "3x": THREE_TIMES, "6x": SIX_TIMES}


def apply_schedule(config: Config, name: str) -> Config:
    """Sets the epochs and milestones of `1x`, `3x` or `6x`; the rest of the schedule is kept.

    Raises:
        ValueError: `name` is none of these.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {name!r}, expected one of {', '.join(SCHEDULES)}")
    chosen = SCHEDULES[name]
    schedule = replace(config.schedule, epochs=chosen.epochs, milestones=chosen.milestones)
    return replace(config, schedule=schedule)


def _with_depth(config: Config, name: str, description: str) -> Config:
    model = replace(config.model, backbone=BackboneConfig(depth=101))
    return replace(config, name=name, description=description, model=model)


def _with_short_side_512(config: Config, name: str, description: str) -> Config:
    resize = KeepRatioResize(short_side=512, long_side=852)
    return replace(
        config,
        name=name,
        description=description,
        input=InputSpec(resize=resize),
        augment=AugmentConfig(short_sides=SHORT_SIDES_512),
    )


SOLO_R101 = _with_depth(SOLO_R50, "solo_r101", "SOLO, ResNet-101, short side 800, 3x")
SOLO_512_R50 = _with_short_side_512(
    replace(SOLO_R50, schedule=SIX_TIMES), "solo_512_r50", "SOLO-512, ResNet-50, 6x"
)
SOLO_512_R101 = _with_short_side_512(
    replace(SOLO_R101, schedule=SIX_TIMES), "solo_512_r101", "SOLO-512, ResNet-101, 6x"
)
SOLO_RDCN101 = replace(
    SOLO_R101,
    name="solo_rdcn101",
    description="SOLO, ResNet-101 with deformable convolutions, short side 800, 6x",
    model=replace(SOLO_R101.model, backbone=BackboneConfig(depth=101, deformable_stages=(2, 3, 4))),
    schedule=SIX_TIMES,
)
DECOUPLED_R50 = replace(
    SOLO_R50,
    name="decoupled_solo_r50",
    description="Decoupled SOLO, ResNet-50, short side 800, 3x",
    model=NetworkConfig(head=HeadConfig(kind="decoupled")),
)
DECOUPLED_R101 = _with_depth(
    DECOUPLED_R50, "decoupled_solo_r101", "Decoupled SOLO, ResNet-101, short side 800, 3x"
)
DECOUPLED_LIGHT_R50 = _with_short_side_512(
    replace(
        SOLO_R50,
        model=NetworkConfig(
            head=HeadConfig(kind="decoupled_light", num_convs=4, scale_ranges=LIGHT_SCALE_RANGES)
        ),
    ),
    "decoupled_solo_light_r50",
    "Decoupled Light SOLO, ResNet-50, short side 512, 3x",
)
DECOUPLED_LIGHT_DCN_R50 = replace(
    DECOUPLED_LIGHT_R50,
    name="decoupled_solo_light_dcn_r50",
    description="Decoupled Light SOLO with deformable convolutions, ResNet-50, short side 512, 3x",
    model=replace(
        DECOUPLED_LIGHT_R50.model,
        backbone=BackboneConfig(deformable_stages=(2, 3, 4)),
        head=replace(DECOUPLED_LIGHT_R50.model.head, deformable=True),
    ),
)
CONTOUR_R50 = as_contours(
    SOLO_R50,
    name="solo_r50_contour",
    description="Detection contour detection, ResNet-50, short side 800, 3x",
)

COCO_CONFIGS = (
    SOLO_R50,
    SOLO_R101,
    SOLO_RDCN101,
    SOLO_512_R50,
    SOLO_512_R101,
    DECOUPLED_R50,
    DECOUPLED_R101,
    DECOUPLED_LIGHT_R50,
    DECOUPLED_LIGHT_DCN_R50,
    CONTOUR_R50,
)
