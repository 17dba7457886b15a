"""The demo page corrects a result, and saves it so that training reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.browser.demo import Demo
from tests.browser.scene import IN_GREEN, IN_RED, SCENE
from training.data.formats import open_dataset

pytestmark = pytest.mark.browser
_FILL = """
async (points) => (await import(`${location.origin}/web/edit.js`))
  .fillPolygon(points, { width: 40, height: 30 })
"""


def draw(demo: Demo, *corners: tuple[float, float]) -> None:
    """Clicks corners, given as shares of the picture's size."""
    box = demo.by_id("edit-layer").bounding_box()
    assert box is not None
    for x, y in corners:
        demo.page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])


def click(demo: Demo, x: float, y: float) -> None:
    demo.move_to(x, y)
    demo.page.mouse.down()
    demo.page.mouse.up()


def press(demo: Demo, name: str) -> None:
    demo.page.get_by_role("button", name=name, exact=True).click()


def test_an_instance_is_deleted(demo: Demo) -> None:
    demo.segment(SCENE)
    button = demo.page.get_by_role("button", name="Delete", exact=True)
    assert button.is_disabled()
    click(demo, *IN_RED)
    button.click()
    assert demo.by_id("count").inner_text() == "1 instance"
    assert [row[:5] for row in demo.shown_rows()] == ["green"]
    assert button.is_disabled() and demo.by_id("export").is_disabled()
    click(demo, *IN_GREEN)
    demo.page.keyboard.press("Delete")
    assert demo.by_id("count").inner_text() == "No instances"
    demo.segment(SCENE)
    assert demo.by_id("count").inner_text() == "2 instances"
    assert demo.by_id("export").is_enabled()


def test_what_was_corrected_is_a_data_set(demo: Demo, downloads: Path) -> None:
    demo.segment(SCENE, "scene.png")
    click(demo, *IN_RED)
    press(demo, "Redraw")
    draw(demo, (0.25, 0.25), (0.5, 0.25), (0.5, 0.75), (0.25, 0.75), (0.25, 0.25))
    demo.by_id("edit-class").select_option(label="blue")
    press(demo, "Add")
    draw(demo, (0.02, 0.02), (0.12, 0.02), (0.12, 0.12), (0.9, 0.9))
    demo.page.keyboard.press("Backspace")
    demo.page.keyboard.press("Enter")
    assert [row.split(",")[0] for row in demo.shown_rows()] == ["blue", "red", "green"]
    demo.save("Save as COCO", downloads)
    (downloads / "scene.png").write_bytes(SCENE)
    content = open_dataset(downloads, "")
    names = {category["id"]: category["name"] for category in content.categories}
    found = {names[a["category_id"]]: a for a in content.annotations or ()}
    assert list(found) == ["blue", "red", "green"]
    red = coco_mask.decode(found["red"]["segmentation"])
    assert red.shape == (40, 80) and found["red"]["area"] == red.sum() == 400
    assert red[10:30, 20:40].all() and found["red"]["bbox"] == [20, 10, 20, 20]
    blue = coco_mask.decode(found["blue"]["segmentation"])
    assert 10 <= blue.sum() <= 22 and not blue[5:].any()


def test_drawing_can_be_cancelled(demo: Demo) -> None:
    demo.segment(SCENE)
    press(demo, "Add")
    assert "Click the corners" in demo.by_id("edit-hint").inner_text()
    draw(demo, (0.1, 0.1), (0.2, 0.1))
    demo.page.keyboard.press("Enter")  # not enough corners
    assert demo.by_id("edit-layer").is_visible()
    demo.page.keyboard.press("Escape")
    assert not demo.by_id("edit-layer").is_visible()
    assert demo.by_id("count").inner_text() == "2 instances"


@pytest.mark.parametrize("seed", range(6))
def test_polygons_are_filled_at_pixel_centres(demo: Demo, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = (rng.integers(-80, 480, (3 + seed, 2)) / 10).tolist()
    found = demo.page.evaluate(_FILL, points)
    expected = np.zeros((30, 40), bool)
    ys, xs = np.mgrid[:30, :40] + 0.5
    for (x1, y1), (x2, y2) in zip(points, [*points[1:], points[0]], strict=True):
        crosses = (x1 <= xs) != (x2 <= xs)
        with np.errstate(divide="ignore", invalid="ignore"):
            expected ^= crosses & (y1 + (xs - x1) * (y2 - y1) / (x2 - x1) > ys)
    if not expected.any():
        assert found is None
        return
    mask = coco_mask.decode(found["segmentation"]).astype(bool)
    np.testing.assert_array_equal(mask, expected)
    assert found["area"] == expected.sum()
    assert found["bbox"] == coco_mask.toBbox(found["segmentation"]).tolist()


def test_a_polygon_without_pixels_is_none(demo: Demo) -> None:
    for points in ([], [[1, 1]], [[1, 1], [5, 5]], [[50, 50], [60, 50], [60, 60]]):
        assert demo.page.evaluate(_FILL, points) is None
    whole = demo.page.evaluate(_FILL, [[0, 0], [40, 0], [40, 30], [0, 30]])
    assert whole["area"] == 1200
    assert coco_mask.decode(whole["segmentation"]).all()
