"""Candidates become instances: NMS, binarise, top N, paste, merge over tiles (paper, 3.4).

The only post-processing there is: the server and the evaluation of training both call it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from service.pipeline.model_config import MatrixNms, PostprocessSpec
from service.pipeline.nms import mask_nms, matrix_nms
from service.pipeline.paste import build_instance, paste_mask
from service.pipeline.types import Candidates, Instance, Prepared, Tile

CONTAINED = 0.5
"""A mask that an inner tile border cuts is a duplicate if another covers this share of it."""
DUPLICATE_IOU = 0.5


def select(
    candidates: Candidates, spec: PostprocessSpec
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """NMS at the mask stride.

    Args:
        candidates: One tile's, best first.
        spec: Kind of NMS and thresholds.

    Returns:
        Scores and indices of the survivors, best first (ties: the earlier candidate).
    """
    filled = np.flatnonzero(candidates.scores > 0)
    masks = candidates.mask_probs[filled] > spec.mask_threshold
    shown = masks.any(axis=(1, 2))
    filled, masks = filled[shown], masks[shown]
    scores, labels = candidates.scores[filled], candidates.labels[filled]
    if isinstance(spec.nms, MatrixNms):
        scores = matrix_nms(scores, labels, masks, kernel=spec.nms.kernel, sigma=spec.nms.sigma)
        kept = np.arange(len(scores))
    else:
        kept = mask_nms(scores, labels, masks, iou_threshold=spec.nms.iou_threshold)
    kept = kept[scores[kept] >= spec.update_threshold]
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    return scores[kept], filled[kept]


def _mask_stride(tile: Tile, candidates: Candidates) -> int:
    height, width = candidates.mask_probs.shape[1:]
    stride, rest = divmod(tile.image.shape[0], height)
    if rest or width * stride != tile.image.shape[1]:
        raise ValueError(
            f"masks of {height}x{width} do not divide the canvas {tile.image.shape[:2]}"
        )
    return int(stride)


def _tile_instances(
    tile: Tile,
    candidates: Candidates,
    image_hw: tuple[int, int],
    spec: PostprocessSpec,
    score_threshold: float,
    max_instances: int,
) -> list[Instance]:
    scores, indices = select(candidates, spec)
    stride = _mask_stride(tile, candidates)
    instances: list[Instance] = []
    for score, index in zip(scores, indices, strict=True):
        if score < score_threshold or len(instances) == max_instances:
            break
        mask = paste_mask(candidates.mask_probs[index], tile, stride, spec.mask_threshold)
        if mask is not None:
            label = int(candidates.labels[index])
            instances.append(build_instance(mask, image_hw, label, float(score)))
    return instances


def _touches_cut(instance: Instance, tile: Tile) -> bool:
    """Whether a mask reaches a border of its tile behind which the image goes on."""
    x, y, width, height = instance.bbox_xywh
    window = tile.window
    top, left, bottom, right = tile.cut
    return (
        (top and y == window.y)
        or (left and x == window.x)
        or (bottom and y + height == window.y + window.height)
        or (right and x + width == window.x + window.width)
    )


def merge_tiles(found: Sequence[tuple[Instance, bool]]) -> list[Instance]:
    """Greedy NMS over the tiles of one image.

    Whole masks come first, then those that an inner border cuts; each group best first. A mask
    goes if a kept one of its class is the same (IoU), and a cut one also if a kept one covers
    it.

    Args:
        found: Instances of all tiles, each with whether an inner border cuts it.

    Returns:
        The kept ones by descending score.
    """
    order = sorted(range(len(found)), key=lambda i: (found[i][1], -found[i][0].score))
    instances = [found[i][0] for i in order]
    cut = [found[i][1] for i in order]
    if not instances:
        return []
    rles = [instance.rle for instance in instances]
    iou = np.asarray(coco_mask.iou(rles, rles, [0] * len(rles)))
    share = np.asarray(coco_mask.iou(rles, rles, [1] * len(rles)))  # of the first mask's area
    labels = np.array([instance.label for instance in instances])
    duplicate = iou > DUPLICATE_IOU
    duplicate |= (share > CONTAINED) & np.array(cut)[:, None]
    duplicate &= labels[:, None] == labels[None, :]
    kept: list[int] = []
    for index in range(len(instances)):
        if not duplicate[index, kept].any():
            kept.append(index)
    return sorted((instances[i] for i in kept), key=lambda instance: -instance.score)


def postprocess(
    prepared: Prepared,
    candidates: Sequence[Candidates],
    spec: PostprocessSpec,
    *,
    score_threshold: float | None = None,
    max_instances: int | None = None,
) -> list[Instance]:
    """Instances of one image, best first.

    Args:
        prepared: The image's tiles.
        candidates: One entry a tile, in their order.
        spec: The model's post-processing.
        score_threshold: Least score of a returned instance; default from `spec`.
        max_instances: Most instances returned; default from `spec`.

    Raises:
        ValueError: The number of candidates' entries is not that of the tiles, or a bound is
            out of range.
    """
    threshold = spec.score_threshold if score_threshold is None else score_threshold
    bound = spec.max_instances if max_instances is None else max_instances
    if len(candidates) != len(prepared.tiles):
        raise ValueError(f"{len(candidates)} candidate sets for {len(prepared.tiles)} tiles")
    if not 0 <= threshold <= 1 or bound < 1:
        raise ValueError(f"score_threshold {threshold} or max_instances {bound} is out of range")
    found: list[tuple[Instance, bool]] = []
    for tile, tile_candidates in zip(prepared.tiles, candidates, strict=True):
        found += [
            (instance, _touches_cut(instance, tile))
            for instance in _tile_instances(
                tile, tile_candidates, prepared.image_hw, spec, threshold, bound
            )
        ]
    if len(prepared.tiles) == 1:
        return [instance for instance, _ in found]
    return merge_tiles(found)[:bound]
