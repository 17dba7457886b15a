"""Detection contour detection as a change of any configuration (paper, section 6)."""

from __future__ import annotations

from dataclasses import replace

from training.configs.schema import Config

CONTOUR_THRESHOLD = 0.2
"""Probability above which a pixel belongs to a contour.

Below 0.5 because a curve one pixel wide is rarely predicted at the exact pixel, and because focal
loss (alpha 0.25) gives an even chance a probability below 0.5: a threshold of 0.5 leaves isolated
dots. Chosen in docs/experiments.md.
"""


def as_contours(
    config: Config, *, name: str, description: str, mask_weight: float | None = None
) -> Config:
    """`config` for the contours of objects instead of their masks.

    The ground truth is the contour of each mask, and the mask loss is the focal loss; the rest of
    the training is unchanged. NMS compares the regions that the contours enclose, because two
    curves one pixel wide around the same object hardly overlap. That comparison and the threshold
    are ours; `--recipe paper` replaces them by the paper's inference.

    Args:
        config: A segmentation configuration.
        name: Name of the new configuration.
        description: Description of the new configuration.
        mask_weight: Factor of the mask loss; None: the paper's 20.
    """
    config = replace(
        config,
        name=name,
        description=description,
        targets=replace(config.targets, masks="contour"),
        loss=replace(config.loss, mask_loss="focal", mask_weight=mask_weight),
    )
    return with_contour_inference(config, closed=True)


def with_contour_inference(config: Config, *, closed: bool) -> Config:
    """Sets how contours become instances.

    Args:
        config: A configuration for contours.
        closed: NMS of the enclosed regions with our threshold, else the paper's inference: NMS of
            the curves themselves, binarised at 0.5.
    """
    threshold = CONTOUR_THRESHOLD if closed else 0.5
    changes = {"compare": "enclosed" if closed else "masks", "mask_threshold": threshold}
    return replace(
        config,
        model=replace(config.model, mask_threshold=threshold),
        postprocess=config.postprocess.model_copy(update=changes),
    )
