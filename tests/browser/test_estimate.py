"""The page's count of tiles against the server's, and its estimates of time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipeline.model_config import InputSpec
from pipeline.preprocess import count_canvases
from tests.support.blob_model import KEEP_RATIO_INPUT

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

_COUNT = """
async ([sizes, resize]) => {
  const { countCanvases } = await import("/web/estimate.js");
  return sizes.map(([height, width]) => countCanvases({ height, width }, resize));
}
"""
_PACE = """
async ([answers, name, canvases]) => {
  const { Pace } = await import("/web/estimate.js");
  const pace = new Pace();
  for (const answer of answers) pace.learn(...answer);
  return pace.estimate(name, canvases);
}
"""
_TIME_LEFT = """
async ([expected, lines]) => {
  const { TimeLeft } = await import("/web/estimate.js");
  const left = new TimeLeft(expected);
  return lines.map(([canvases_done, canvases, elapsed_s]) =>
    left.update({ canvases_done, canvases, elapsed_s }));
}
"""
_DESCRIBE = """
async ([name, calls]) => {
  const text = await import("/web/text.js");
  return calls.map((values) => text[name](...values));
}
"""


def describe(page: Page, name: str, *calls: Sequence[Any]) -> list[str]:
    """Texts of a function of text.js, one for each list of arguments."""
    texts: list[str] = page.evaluate(_DESCRIBE, [name, calls])
    return texts


@pytest.mark.parametrize(
    ("tile_hw", "overlap_px"),
    [((144, 144), 32), ((64, 64), 16), ((64, 96), 0), ((50, 33), 32), ((1, 1), 0)],
)
def test_tiles_are_counted_as_the_server_counts_them(
    page: Page, tile_hw: tuple[int, int], overlap_px: int
) -> None:
    resize = {"rule": "tile", "scale": 2.0, "tile_hw": tile_hw, "overlap_px": overlap_px}
    spec = InputSpec.model_validate({"resize": resize})
    edges = [1, *range(30, 180), 3000, 8191]
    sides = np.random.default_rng(7).integers(1, 6000, (500, 2)).tolist()
    sizes = [*([e, e] for e in edges), *([e, 65] for e in edges), *sides]
    counted = page.evaluate(_COUNT, [sizes, spec.resize.model_dump(mode="json")])
    assert counted == [count_canvases((height, width), spec) for height, width in sizes]


def test_a_whole_image_is_one_canvas(page: Page) -> None:
    spec = InputSpec.model_validate(KEEP_RATIO_INPUT)
    resize = spec.resize.model_dump(mode="json")
    assert page.evaluate(_COUNT, [[[5000, 9000], [1, 1]], resize]) == [1, 1]
    assert count_canvases((5000, 9000), spec) == 1


def test_the_time_of_an_image_is_that_of_the_largest_answer(page: Page) -> None:
    def estimate(*answers: tuple[str, int, float]) -> float | None:
        seconds: float | None = page.evaluate(_PACE, [answers, "a", 400])
        return seconds

    assert estimate() is None
    assert estimate(("b", 10, 1.0)) is None, "each model has its own pace"
    assert estimate(("a", 1, 1.0)) == pytest.approx(400)
    assert estimate(("a", 1, 1.0), ("a", 100, 5.0), ("a", 2, 1.0)) == pytest.approx(20)
    assert estimate(("a", 100, 5.0), ("a", 100, 10.0)) == pytest.approx(40), "the latest of equals"


def test_the_remaining_time_follows_the_progress(page: Page) -> None:
    def update(expected: float | None, *lines: tuple[int, int, float]) -> list[float | None]:
        seconds: list[float | None] = page.evaluate(_TIME_LEFT, [expected, lines])
        return seconds

    lines = ((0, 100, 1.0), (0, 100, 9.0), (10, 100, 10.0), (10, 100, 11.0), (30, 100, 14.0))
    assert update(None, *lines) == [None, None, None, None, pytest.approx(14)]
    assert update(50.0, *lines) == pytest.approx([50, 50, 45, 45, 14])
    assert update(None, (5, 20, 1.0), (20, 20, 4.0)) == [None, 0]


def test_durations_are_rounded(page: Page) -> None:
    expected = {
        0: "about 1 s",
        1.6: "about 2 s",
        9.4: "about 9 s",
        9.6: "about 10 s",
        22: "about 20 s",
        57: "about 55 s",
        58: "about 1 minute",
        89: "about 1 minute",
        91: "about 2 minutes",
        180: "about 3 minutes",
        5390: "about 90 minutes",
        5410: "about 2 hours",
        86400: "about 24 hours",
    }
    assert describe(page, "describeDuration", *([s] for s in expected)) == list(expected.values())


def test_texts_of_an_estimate_and_of_progress(page: Page) -> None:
    estimates: list[list[Any]] = [[2116, 180], [101, None]]
    assert describe(page, "describeEstimate", *estimates) == [
        "This image needs 2,116 tiles (about 3 minutes)",
        "This image needs 101 tiles",
    ]
    calls: list[list[Any]] = [[12, 441, 20], [0, 441, None], [1000, 2116, 80], [441, 441, 0]]
    assert describe(page, "describeProgress", *calls) == [
        "12 of 441 tiles, about 20 s left",
        "0 of 441 tiles",
        "1,000 of 2,116 tiles, about 1 minute left",
        "441 of 441 tiles, preparing the answer",
    ]
