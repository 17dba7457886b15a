"""Two recipes: training and inference as in the paper, or as in the published code."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from pipeline.model_config import MaskNms, MatrixNms
from training.configs.coco import PAPER_SHORT_SIDES_512, SHORT_SIDES_512
from training.configs.contours import with_contour_inference
from training.configs.schema import AugmentConfig, Config

Recipe = Literal["paper", "published"]


def apply_recipe(config: Config, recipe: Recipe) -> Config:
    """Sets all options in which the paper and the published code differ.

    =================  ==============================  =====================================
    option             paper                           published
    =================  ==============================  =====================================
    positive cells     all of the centre region        at most +-1 cell from the centre's
    output kernels     1x1                             3x3 (categories, decoupled masks)
    Dice loss          no epsilon                      1e-3 added to both sums of squares
    gradients          not clipped                     norm clipped at 35 (authors' code)
    candidates         category score alone            points NMS, area filter, maskness
    duplicates         mask NMS, then top 100          Matrix NMS, score >= 0.05, top 100
    jitter at 512      410-512 (640-800 scaled)        352-512 (Decoupled Light)
    contours           found on the canvas, resized;   found on the resized mask; threshold 0.2,
                       threshold 0.5, NMS of curves    NMS of enclosed regions (both ours)
    =================  ==============================  =====================================

    The extents of targets are those of the masks in both, and images without objects are left out
    of training in both: the published code leaves them out, and the paper was trained with it. The
    paper gives no threshold for its mask NMS; 0.5 is the usual one. `published` keeps the 500 best
    cells before maskness and the area filter, so that the graph has a fixed size; the published
    code keeps 500 after them. They differ only for canvases with more than 500 cells above 0.1
    after points NMS.

    Raises:
        ValueError: `recipe` is neither.
    """
    if recipe not in get_args(Recipe):
        raise ValueError(f"recipe is {recipe!r}, expected one of {', '.join(get_args(Recipe))}")
    paper = recipe == "paper"
    kernel: Literal[1, 3] = 1 if paper else 3
    head = replace(config.model.head, category_kernel=kernel, mask_kernel=kernel)
    config = replace(
        config,
        model=replace(config.model, recipe=recipe, head=head),
        targets=replace(config.targets, recipe=recipe),
        loss=replace(config.loss, dice_eps=0.0 if paper else 1e-3),
        augment=_jitter(config, paper),
        schedule=replace(
            config.schedule, clip_norm=None if paper else 35.0, skip_empty_images=True
        ),
        postprocess=config.postprocess.model_copy(
            update={
                "nms": MaskNms(iou_threshold=0.5) if paper else MatrixNms(),
                "update_threshold": 0.0 if paper else 0.05,
            }
        ),
    )
    if config.targets.masks == "region":
        return config
    return with_contour_inference(config, closed=not paper)


def _jitter(config: Config, paper: bool) -> AugmentConfig:
    """The augmentation with the recipe's jitter, if it has that of the other one at 512."""
    other, own = SHORT_SIDES_512, PAPER_SHORT_SIDES_512
    if not paper:
        other, own = own, other
    if config.augment.short_sides != other:
        return config.augment
    return replace(config.augment, short_sides=own)
