from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import overview as module
from pipeline.draw import draw_instances
from pipeline.overview import draw_overview
from pipeline.types import Detection, Window
from tests.support.found import draw_blobs, to_instance, to_mask

HW = (61, 90)
WHOLE = Window(0, 0, *HW)
PIXELS = np.random.default_rng(3).integers(0, 255, (*HW, 3), np.uint8)


def read(window: Window) -> NDArray[np.uint8]:
    assert window.height > 0 and window.width > 0
    part = PIXELS[window.y : window.y + window.height, window.x : window.x + window.width]
    assert part.shape[:2] == (window.height, window.width)
    return part


def build_instances() -> list[Detection]:
    corner = np.zeros(HW, bool)
    corner[-1, -1] = True
    return [to_instance(draw_blobs(seed, HW)) for seed in range(3)] + [to_instance(corner)]


@pytest.mark.parametrize("shown", [WHOLE, Window(0, 0, 20, 30), Window(17, 33, 44, 57)])
def test_a_small_part_is_drawn_as_it_is(shown: Window) -> None:
    """By the drawing of the masks cut to the part."""
    rows, columns = slice(shown.y, shown.y + shown.height), slice(shown.x, shown.x + shown.width)
    cut = [to_mask(i)[rows, columns] for i in build_instances()]
    expected = draw_instances(read(shown), [to_instance(mask) for mask in cut if mask.any()])
    found = draw_overview(read, shown, build_instances(), "segmentation")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("stripe", [1 << 24, 100, 1])
@pytest.mark.parametrize("side", [45, 30, 7, 2])
def test_a_pixel_shows_a_mask_that_any_of_its_pixels_has(
    monkeypatch: pytest.MonkeyPatch, side: int, stripe: int
) -> None:
    monkeypatch.setattr(module, "MAX_SIDE_PX", side)
    monkeypatch.setattr(module, "_STRIPE_PIXELS", stripe)
    factor = -(-90 // side)
    below, right = (-length % factor for length in HW)
    expected = []
    for instance in build_instances():
        padded = np.pad(to_mask(instance), ((0, below), (0, right)))
        h, w = padded.shape[0] // factor, padded.shape[1] // factor
        squares = padded.reshape(h, factor, w, factor)
        expected.append(to_instance(np.asarray(squares.any(axis=(1, 3)))))
    plain = draw_overview(read, WHOLE, [], "segmentation")
    assert plain.shape == (-(-61 // factor), -(-90 // factor), 3)
    assert abs(float(plain.mean()) - float(PIXELS.mean())) < 12
    found = draw_overview(read, WHOLE, build_instances(), "segmentation")
    np.testing.assert_array_equal(found, draw_instances(plain, expected))
    rows, columns = 61 // factor, 90 // factor
    inner = PIXELS[: rows * factor, : columns * factor]
    mean = cv2.resize(inner, (columns, rows), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(plain[:rows, :columns], mean)
