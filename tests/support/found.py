"""Instances as a model might find them, and whole pages of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from skimage.draw import polygon2mask

from pipeline.model_config import ClassSpec
from pipeline.runs import BoxMask, build_instance
from pipeline.types import Detection
from pipeline.writers import Page

Mask = NDArray[np.bool_]
CLASSES = (ClassSpec(category_id=7, name="cell"), ClassSpec(category_id=9, name="other, one"))
NAMES = ("a \"b\" <c> & 'd', e", "=1+1", "ядро\u2028😀", "x\ny\t", "null", "1.5")
"""Class names that the syntax of one format or another might break on."""


def to_instance(mask: NDArray[Any], label: int = 0, score: float = 0.5) -> Detection:
    """An instance of a mask [H, W] of the whole image."""
    filled = mask.astype(bool)
    rows, columns = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0))
    box = filled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    hw = int(mask.shape[0]), int(mask.shape[1])
    return build_instance(BoxMask(int(rows[0]), int(columns[0]), box), hw, label, score)


def to_mask(instance: Detection) -> Mask:
    """The mask [H, W] of an instance."""
    return np.asarray(coco_mask.decode(instance.rle)).astype(bool)


def draw_blobs(seed: int, hw: tuple[int, int] | None = None) -> Mask:
    """A mask of several parts with holes, touching corners and single pixels."""
    rng = np.random.default_rng(seed)
    height, width = hw or (int(v) for v in rng.integers(1, 60, 2))
    noise = cv2.GaussianBlur(rng.random((height, width)), (0, 0), rng.uniform(0.3, 4))
    return np.asarray(noise >= np.quantile(noise, rng.uniform(0, 0.95)))


def build_page(
    count: int = 3, hw: tuple[int, int] = (40, 50), *, name: str = "a.png", **fields: Any
) -> Page:
    """A page of masks of all kinds; the first is one pixel, the second a ring."""
    single, ring = np.zeros(hw, bool), np.zeros(hw, bool)
    single[hw[0] - 1, hw[1] - 1] = True
    ring[2:12, 3:13] = True
    ring[5:8, 6:9] = False
    ring[8, 9] = False
    masks = [single, ring, *(draw_blobs(seed, hw) for seed in range(2, count))][:count]
    instances = [
        to_instance(mask, index % len(CLASSES), 1 - index / (count + 1))
        for index, mask in enumerate(masks)
    ]
    given = {"name": name, "image_hw": hw, "classes": CLASSES, "instances": instances}
    return Page(**{**given, **fields})


def fill_rings(rings: Iterable[NDArray[Any]], hw: tuple[int, int]) -> Mask:
    """What scikit-image draws inside rings [P, 2] of x, y, by the even-odd rule."""
    drawn = np.zeros(hw, bool)
    for ring in rings:
        drawn ^= polygon2mask(hw, ring[:, ::-1] - 0.5)  # type: ignore[no-untyped-call, unused-ignore]
    return drawn


def merge_polygons(polygons: Sequence[Sequence[float]], hw: tuple[int, int]) -> Mask:
    """What pycocotools draws."""
    drawn = coco_mask.frPyObjects([list(p) for p in polygons], *hw)
    return np.asarray(coco_mask.decode(coco_mask.merge(drawn))).astype(bool)
