"""Matrix NMS and mask NMS on binary masks, exact, by matrix products.

Symbols: N masks, sorted by descending score.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from pipeline.types import Bool, Float32, Int64

BLOCK = 32
"""Side of the blocks in which masks are compared, px at the mask stride."""


def pairwise_intersections(masks: Bool) -> Float32:
    """Shared pixels of every pair.

    The plane is cut into blocks, and in each block only the masks that reach it are multiplied:
    many small objects cost little, and no float copy of all masks exists.

    Args:
        masks: [N, h, w] bool.

    Returns:
        [N, N] float32, whole numbers.
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
    """Mask IoU of every pair.

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

    Mask j is decayed by min_i f(iou_ij) / f(iou_i*) over the better masks i of its class,
    where iou_i* is the largest IoU of i with a mask better than i; f(x) = exp(-sigma x^2) or
    1 - x.

    Args:
        scores: [N] descending.
        labels: [N].
        masks: [N, h, w] bool.
        kernel: f.
        sigma: Of the Gaussian.

    Returns:
        [N] float32, in the given order.
    """
    count = len(scores)
    if count == 0:
        return np.zeros(0, np.float32)
    better = np.triu(np.ones((count, count), bool), 1) & (labels[:, None] == labels[None, :])
    iou = np.where(better, pairwise_iou(masks), np.float32(0))
    compensate = iou.max(axis=0)[:, None]  # of the better mask i, along j
    if kernel == "gaussian":
        decay = np.exp(-sigma * iou**2) / np.exp(-sigma * compensate**2)
    else:
        decay = (1 - iou) / np.maximum(1 - compensate, np.finfo(np.float32).tiny)
    return np.asarray(scores * decay.min(axis=0), np.float32)


def mask_nms(scores: Float32, labels: Int64, masks: Bool, *, iou_threshold: float = 0.5) -> Int64:
    """Greedy NMS: a mask is dropped if a kept better mask of its class overlaps it too much.

    Args:
        scores: [N] descending.
        labels: [N].
        masks: [N, h, w] bool.
        iou_threshold: IoU above which the lesser mask is dropped.

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
