"""The page's run-length decoding and drawing held against pycocotools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.runs import read_counts

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

Mask = NDArray[np.uint8]

_DECODE = """
async (rle) => {
  const { decodeCounts, measureRing, traceRings } = await import("/web/rle.js");
  const rings = traceRings(rle);
  return {
    runs: decodeCounts(rle.counts),
    areas: rings.map((ring) => measureRing(ring) / 2),
  };
}
"""
_FILL = """
async (instance) => {
  const { prepareInstances } = await import("/web/draw.js");
  const [height, width] = instance.segmentation.size;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fill(prepareInstances([instance])[0].path, "evenodd");
  const { data } = context.getImageData(0, 0, width, height);
  return Array.from({ length: width * height }, (_, i) => data[4 * i + 3]).join(" ");
}
"""


def draw_disc(height: int, width: int, y: float, x: float, radius: float) -> Mask:
    rows, columns = np.ogrid[:height, :width]
    return np.asarray((rows - y) ** 2 + (columns - x) ** 2 <= radius**2, np.uint8)


def build_masks() -> dict[str, Mask]:
    rng = np.random.default_rng(3)
    ring = draw_disc(40, 50, 20, 25, 15) - draw_disc(40, 50, 20, 25, 7)
    corners = np.zeros((9, 11), np.uint8)
    corners[[0, 0, -1, -1], [0, -1, 0, -1]] = 1
    one = np.zeros((7, 5), np.uint8)
    one[3, 2] = 1
    return {
        "disc": draw_disc(31, 47, 12, 20, 9),
        "hole": ring,
        "island in a hole": ring + draw_disc(40, 50, 20, 25, 3),
        "two parts": draw_disc(30, 60, 10, 12, 8) | draw_disc(30, 60, 18, 45, 9),
        "checkerboard": np.asarray(np.indices((8, 9)).sum(axis=0) % 2, np.uint8),
        "slanting line": np.eye(12, 15, dtype=np.uint8),
        "everything": np.ones((13, 6), np.uint8),
        "columns that touch": np.asarray([[0, 1, 1], [0, 0, 1], [1, 0, 1]], np.uint8),
        "corners": corners,
        "one pixel": one,
        "one row": np.asarray([[1, 0, 1, 1, 0]], np.uint8),
        "noise": np.asarray(rng.random((25, 33)) < 0.5, np.uint8),
        "sparse noise": np.asarray(rng.random((64, 20)) < 0.03, np.uint8),
        "large": draw_disc(700, 900, 350, 450, 340) - draw_disc(700, 900, 300, 400, 100),
    }


MASKS = build_masks()


def encode(mask: Mask) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


@pytest.mark.parametrize("name", MASKS)
def test_runs_and_rings_are_those_of_the_mask(page: Page, name: str) -> None:
    mask = MASKS[name]
    rle = encode(mask)
    found = page.evaluate(_DECODE, rle)
    assert found["runs"] == read_counts(rle["counts"], mask.size).tolist()
    assert sum(found["areas"]) == coco_mask.area(rle)


@pytest.mark.parametrize("name", MASKS)
def test_what_is_filled_is_the_mask_pixel_by_pixel(page: Page, name: str) -> None:
    rle = encode(MASKS[name])
    instance = {"segmentation": rle, "bbox": coco_mask.toBbox(rle).tolist()}
    opacities = page.evaluate(_FILL, instance).split(" ")
    filled = np.array(opacities, np.uint8).reshape(rle["size"])
    assert set(np.unique(filled)) <= {0, 255}
    np.testing.assert_array_equal(filled == 255, coco_mask.decode(rle))


def test_rings_tell_holes_and_keep_corners_together(page: Page) -> None:
    (outer, hole) = page.evaluate(_DECODE, encode(MASKS["hole"]))["areas"]
    assert (outer > 0, hole < 0) == (True, True)
    assert len(page.evaluate(_DECODE, encode(MASKS["slanting line"]))["areas"]) == 1
    assert len(page.evaluate(_DECODE, encode(MASKS["corners"]))["areas"]) == 4


def test_runs_of_more_than_31_bits_are_read(page: Page) -> None:
    runs = [2**33, 5, 3, 2**32]  # the fourth is written as the difference 2**32 - 5
    text = ""
    for value in (runs[0], runs[1], runs[2], runs[3] - runs[1]):
        while True:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text += chr(48 + (group | (32 if more else 0)))
            if not more:
                break
    expression = "async (text) => (await import('/web/rle.js')).decodeCounts(text)"
    assert page.evaluate(expression, text) == runs


@pytest.mark.parametrize(
    ("counts", "message"),
    [("P", "ends inside a number"), ("0 1", "has the character"), ("99", "does not fit")],
)
def test_a_broken_encoding_is_an_error(page: Page, counts: str, message: str) -> None:
    expression = """
    async (rle) => (await import("/web/rle.js").then((m) => m.traceRings(rle), null)
      .then(() => "", (error) => error.message))
    """
    assert message in page.evaluate(expression, {"size": [2, 3], "counts": counts})
