"""The classical baseline on drawn nuclei."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.support.tiny import UInt8, disc

ndimage = pytest.importorskip("scipy.ndimage", reason="the extra baseline is not installed")
pytest.importorskip("skimage", reason="the extra baseline is not installed")

from benchmarks.watershed import find_foreground, segment_image, split_objects  # noqa: E402

HW = (100, 140)
CENTRES = ((20, 20, 9), (50, 60, 10), (50, 76, 10), (80, 120, 7))
"""Y, x, radius; the second and the third touch."""


def _draw(*, dark: bool) -> tuple[UInt8, list[UInt8]]:
    masks = [disc(*HW, y, x, r) for y, x, r in CENTRES]
    grey = np.full(HW, 20, np.uint8)
    grey[np.any(masks, axis=0)] = 180
    noise = np.random.default_rng(0).integers(0, 10, HW, np.uint8)
    image = np.repeat((grey + noise)[..., None], 3, axis=2)
    return (255 - image if dark else image).astype(np.uint8), masks


@pytest.mark.parametrize("dark", [False, True])
def test_each_nucleus_is_found_also_where_two_touch(dark: bool) -> None:
    image, masks = _draw(dark=dark)
    found = [coco_mask.decode(r["segmentation"]) for r in segment_image(image, 5)]
    assert len(found) == len(masks)
    for mask in masks:
        assert max((mask & other).sum() / (mask | other).sum() for other in found) > 0.75
    assert not np.any(np.sum(found, axis=0) > 1)


def test_the_foreground_is_shared_out_without_a_rest() -> None:
    foreground = find_foreground(_draw(dark=False)[0])
    labels = split_objects(foreground)
    assert np.array_equal(labels > 0, foreground)
    for label in range(1, labels.max() + 1):
        assert ndimage.label(labels == label)[1] == 1


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("hw", [(1, 1), (5, 3), (64, 64)])
def test_an_empty_image_has_few_objects(hw: tuple[int, int], value: int) -> None:
    assert len(segment_image(np.full((*hw, 3), value, np.uint8), 1)) <= 1
