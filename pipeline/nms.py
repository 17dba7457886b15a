"""Matrix NMS and mask NMS on binary masks, exact, by matrix products.

Symbols: N masks, sorted by descending score.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from pipeline.types import Bool, Float32, Int64

BLOCK = 32
"""Side of the blocks in which intersections are computed, px at the mask stride."""


def pairwise_intersections(masks: Bool) -> Float32:
    """Intersection area of every pair of masks, px.

    The plane is divided into blocks, and in each block only the masks with pixels in it are
    multiplied. Many small objects are therefore cheap, and there is no float copy of all masks.

    Args:
        masks: [N, h, w] bool.

    Returns:
        [N, N] float32, integral.
    """
    count, height, width = masks.shape
    shared = np.zeros(count * count, np.float32)
    for y in range(0, height, BLOCK):
        strip = masks[:, y : y + BLOCK]
        columns = np.any(strip, axis=1)
        for x in range(0, width, BLOCK):
            members = np.flatnonzero(columns[:, x : x + BLOCK].any(axis=1))
            if members.size == 0:
                continue
            flat = strip[members, :, x : x + BLOCK].astype(np.float32).reshape(len(members), -1)
            pairs = members[:, None] * count + members
            shared[pairs.reshape(-1)] += (flat @ flat.T).reshape(-1)
    return shared.reshape(count, count)


def pairwise_iou(masks: Bool) -> Float32:
    """Mask IoU of every pair of masks.

    Args:
        masks: [N, h, w] bool.

    Returns:
        [N, N] float32; 0 for a pair of empty masks.
    """
    shared = pairwise_intersections(masks)
    area = shared.diagonal()
    union = area[:, None] + area[None, :] - shared
    iou = np.zeros_like(shared)
    np.divide(shared, union, out=iou, where=union > 0)
    return iou


def matrix_nms(
    scores: Float32,
    labels: Int64,
    masks: Bool,
    *,
    kernel: Literal["gaussian", "linear"] = "gaussian",
    sigma: float = 2.0,
) -> Float32:
    """Decayed scores of Matrix NMS (SOLOv2, arXiv 2003.10152, section 3.3).

    The score of mask j is multiplied by min_i f(iou_ij) / f(iou_i*) over the higher-scored masks
    i of its class, where iou_i* is the largest IoU of i with a mask scored above i;
    f(x) = exp(-sigma x^2) or 1 - x.

    Args:
        scores: [N] descending.
        labels: [N].
        masks: [N, h, w] bool.
        kernel: f, the decay function.
        sigma: Parameter of the Gaussian.

    Returns:
        [N] float32, in the given order.
    """
    count = len(scores)
    if count == 0:
        return np.zeros(0, np.float32)
    better = np.triu(np.ones((count, count), bool), 1) & (labels[:, None] == labels[None, :])
    iou = np.where(better, pairwise_iou(masks), np.float32(0))
    compensate = iou.max(axis=0)[:, None]  # [i, 1], broadcast along j
    if kernel == "gaussian":
        decay = np.exp(-sigma * iou**2) / np.exp(-sigma * compensate**2)
    else:
        decay = (1 - iou) / np.maximum(1 - compensate, np.finfo(np.float32).tiny)
    return np.asarray(scores * decay.min(axis=0), np.float32)


def mask_nms(scores: Float32, labels: Int64, masks: Bool, *, iou_threshold: float = 0.5) -> Int64:
    """Greedy NMS: drops masks that overlap a kept, higher-scored mask of their class.

    Args:
        scores: [N] descending.
        labels: [N].
        masks: [N, h, w] bool.
        iou_threshold: IoU above which the lower-scored mask is dropped.

    Returns:
        Indices of the kept masks, best first.
    """
    overlaps = pairwise_iou(masks) > iou_threshold
    overlaps &= labels[:, None] == labels[None, :]
    alive = np.ones(len(scores), bool)
    for index in range(len(scores)):
        if alive[index]:
            alive[index + 1 :] &= ~overlaps[index, index + 1 :]
    return np.flatnonzero(alive)
