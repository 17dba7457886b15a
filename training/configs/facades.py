"""Photographs of buildings: SOLO-512 with five levels, on a CPU, from ImageNet weights.

docs/experiments.md has the numbers.
"""

from __future__ import annotations

from pipeline.model_config import InputSpec, KeepRatioResize, MatrixNms, PostprocessSpec
from training.configs.coco import LIGHT_SCALE_RANGES
from training.configs.schema import (
    AugmentConfig,
    BackboneConfig,
    Config,
    HeadConfig,
    NetworkConfig,
    ScheduleConfig,
    TargetConfig,
)

FACADES = Config(
    name="facades",
    description="Photographs of buildings: Decoupled SOLO-512, EfficientNet-Lite0, five levels",
    num_classes=10,
    model=NetworkConfig(
        backbone=BackboneConfig(kind="efficientnet_lite0", base_width=32),
        neck_channels=64,
        head=HeadConfig(
            kind="decoupled",
            channels=64,
            num_convs=4,
            scale_ranges=LIGHT_SCALE_RANGES,
            norm_groups=8,
            mask_prior=0.1,
        ),
        candidates=300,
    ),
    targets=TargetConfig(mask_resize="area"),
    augment=AugmentConfig(
        short_sides=(400, 576), brightness=0.15, contrast=0.3, gamma=0.2, stain=0.1
    ),
    schedule=ScheduleConfig(
        optimizer="adamw",
        schedule="cosine",
        lr=1e-3,
        weight_decay=0.05,
        batch_size=8,
        epochs=15,
        repeat_below=0.75,
        warmup_steps=100,
        clip_norm=5.0,
        ema_decay=0.998,
    ),
    input=InputSpec(resize=KeepRatioResize(short_side=512, long_side=852)),
    postprocess=PostprocessSpec(nms=MatrixNms(), score_threshold=0.3, max_instances=200),
)
"""Trained with `solo-train facades --data DATA --init imagenet`. The grids are the paper's, the
scale ranges those of the published Decoupled Light at 512 px."""

FACADES_CONFIGS = (FACADES,)
