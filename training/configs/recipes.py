"""Two recipes: training and inference as in the paper, or as in the published code."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from pipeline.model_config import MaskNms, MatrixNms, PostprocessSpec
from training.configs.schema import Config

Recipe = Literal["paper", "published"]


def apply_recipe(config: Config, recipe: Recipe) -> Config:
    """Sets all options in which the paper and the published code differ.

    =================  ==============================  =====================================
    option             paper                           published
    =================  ==============================  =====================================
    target extents     of the mask                     of the box, at most +-1 cell
    Dice loss          no epsilon                      1e-3 added to both sums of squares
    gradients          not clipped                     norm clipped at 35 (authors' code)
    candidates         category score alone            points NMS, area filter, maskness
    duplicates         mask NMS, then top 100          Matrix NMS, score >= 0.05, top 100
    =================  ==============================  =====================================

    The paper gives no threshold for its mask NMS; 0.5 is the usual one.

    Raises:
        ValueError: `recipe` is neither.
    """
    if recipe not in get_args(Recipe):
        raise ValueError(f"recipe is {recipe!r}, expected one of {', '.join(get_args(Recipe))}")
    paper = recipe == "paper"
    postprocess = PostprocessSpec(
        nms=MaskNms(iou_threshold=0.5) if paper else MatrixNms(),
        compare=config.postprocess.compare,
        update_threshold=0.0 if paper else 0.05,
        mask_threshold=config.postprocess.mask_threshold,
        score_threshold=config.postprocess.score_threshold,
        max_instances=config.postprocess.max_instances,
    )
    return replace(
        config,
        model=replace(config.model, recipe=recipe),
        targets=replace(config.targets, recipe=recipe),
        loss=replace(config.loss, dice_eps=0.0 if paper else 1e-3),
        schedule=replace(config.schedule, clip_norm=None if paper else 35.0),
        postprocess=postprocess,
    )
