"""The bundled model: nuclei in microscopy images, trained from scratch on a CPU.

docs/experiments.md has the experiments behind each choice.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.model_config import (
    ContrastSpec,
    InputSpec,
    MatrixNms,
    PostprocessSpec,
    TileResize,
)
from training.configs.contours import as_contours
from training.configs.schema import (
    AugmentConfig,
    BackboneConfig,
    Config,
    HeadConfig,
    NetworkConfig,
    ScheduleConfig,
    TargetConfig,
)

NUCLEI = Config(
    name="nuclei",
    description="Decoupled SOLO, half-width ResNet-18, 144x144 px tiles shown at 2x",
    num_classes=1,
    model=NetworkConfig(
        backbone=BackboneConfig(depth=18, base_width=32, norm="bn", frozen_stages=0),
        neck_channels=48,
        head=HeadConfig(
            kind="decoupled",
            channels=48,
            num_convs=4,
            num_grids=(36, 18, 9),
            level_strides=(8, 8, 16),
            mask_strides=(4, 4, 8),
            scale_ranges=((1, 48), (32, 96), (64, 2048)),
            norm_groups=8,
            mask_prior=0.1,
        ),
        candidates=200,
    ),
    targets=TargetConfig(mask_resize="area"),
    augment=AugmentConfig(
        scale_jitter=(0.8, 1.25),
        dihedral=True,
        brightness=0.1,
        contrast=0.2,
        gamma=0.3,
        invert=0.1,
    ),
    schedule=ScheduleConfig(
        optimizer="adamw",
        schedule="cosine",
        lr=2e-3,
        weight_decay=0.05,
        batch_size=8,
        epochs=35,
        warmup_steps=100,
        clip_norm=5.0,
        ema_decay=0.998,
    ),
    input=InputSpec(
        resize=TileResize(scale=2.0, tile_hw=(144, 144), overlap_px=32),
        contrast=ContrastSpec(low=0.5, high=99.8, min_range=16),
    ),
    postprocess=PostprocessSpec(nms=MatrixNms(), score_threshold=0.3, max_instances=500),
)

NUCLEI_CONTINUED = replace(
    NUCLEI,
    name="nuclei_continued",
    model=replace(NUCLEI.model, backbone=replace(NUCLEI.model.backbone, norm="frozen_bn")),
    augment=replace(
        NUCLEI.augment,
        scale_jitter=(0.6, 1.6),
        brightness=0.15,
        contrast=0.3,
        gamma=0.4,
        stain=0.25,
        levels=12,
        blur=1.2,
        noise=0.08,
    ),
    schedule=replace(NUCLEI.schedule, lr=1e-3, epochs=56),
)
"""Goes on from the weights of `nuclei`, with more magnifications, stains, noise and blur
(`solo-train nuclei_continued --init model_repo/nuclei`)."""

NUCLEI_ABLATION = replace(
    NUCLEI,
    name="nuclei_ablation",
    description="Small SOLO for comparisons: quarter-width ResNet-18, 96x96 px tiles shown at 2x",
    model=replace(
        NUCLEI.model,
        backbone=BackboneConfig(depth=18, base_width=16, norm="bn", frozen_stages=0),
        neck_channels=32,
        head=HeadConfig(
            channels=32,
            num_convs=3,
            num_grids=(24, 16, 8),
            level_strides=(8, 8, 16),
            mask_strides=(4, 4, 8),
            scale_ranges=((1, 48), (32, 96), (64, 2048)),
            norm_groups=8,
            mask_prior=0.1,
        ),
        candidates=400,
    ),
    schedule=replace(NUCLEI.schedule, epochs=14, ema_decay=0.995),
    input=NUCLEI.input.model_copy(
        update={"resize": TileResize(scale=2.0, tile_hw=(96, 96), overlap_px=24)}
    ),
)
"""Base of the ablations in docs/experiments.md; a run takes minutes on one CPU core."""

NUCLEI_CONTOUR = as_contours(
    replace(
        NUCLEI,
        model=replace(
            NUCLEI.model,
            backbone=replace(NUCLEI.model.backbone, norm="frozen_bn"),
            head=replace(NUCLEI.model.head, level_strides=(4, 8, 16), mask_strides=(2, 4, 8)),
        ),
        schedule=replace(NUCLEI.schedule, lr=1e-3, batch_size=4, epochs=3, ema_decay=0.99),
        postprocess=NUCLEI.postprocess.model_copy(update={"score_threshold": 0.16}),
    ),
    name="nuclei_contour",
    description="Contours of nuclei: the network of `nuclei` with masks at twice the resolution",
    mask_weight=200.0,
)
"""Fine-tunes `nuclei` with the same weights (`solo-train nuclei_contour --init model_repo/nuclei`).

The mask stride is 2, which is one pixel of the image: at 4, the contour of a median nucleus (11 px)
would be as wide as the region that it encloses. The towers run at twice that stride, as published:
features four mask pixels apart cannot represent a contour one pixel wide. The contour covers 0.2%
of the canvas and the loss is the mean over all pixels; with the paper's weight of 20 it would be a
tenth of the category loss. Batch norm is frozen because weights.pt of `nuclei` has it folded into
the convolutions.
"""

NUCLEI_CONFIGS = (NUCLEI, NUCLEI_CONTINUED, NUCLEI_ABLATION, NUCLEI_CONTOUR)
