"""Instance contour detection as a change of any configuration (paper, section 5)."""

from __future__ import annotations

from dataclasses import replace

from training.configs.schema import Config

CONTOUR_THRESHOLD = 0.2
"""Probability above which a pixel belongs to a contour.

A curve one pixel wide is rarely placed to the pixel, and focal loss (alpha 0.25) shifts an even
chance to a probability below 0.5; so 0.5 would leave dots. Chosen in docs/experiments.md.
"""


def as_contours(
    config: Config, *, name: str, description: str, mask_weight: float | None = None
) -> Config:
    """`config` with the masks' outlines instead of the masks.

    Ground truth are the masks' contours, and the mask loss is focal; the rest of the training is
    unchanged. Duplicates are found by comparing what the contours enclose: two curves one pixel
    wide around one object hardly overlap.

    Args:
        config: A configuration of segmentation.
        name: Of the new one.
        description: Of the new one.
        mask_weight: Factor of the mask loss; None is the paper's 20.
    """
    changes = {"compare": "enclosed", "mask_threshold": CONTOUR_THRESHOLD}
    return replace(
        config,
        name=name,
        description=description,
        model=replace(config.model, mask_threshold=CONTOUR_THRESHOLD),
        targets=replace(config.targets, masks="contour"),
        loss=replace(config.loss, mask_loss="focal", mask_weight=mask_weight),
        postprocess=config.postprocess.model_copy(update=changes),
    )
