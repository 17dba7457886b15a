"""What the demo page does with a result, and what it looks like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tests.browser.conftest import OpenDemo
from tests.browser.demo import Demo
from tests.browser.scene import (
    BLACK,
    IN_GREEN,
    IN_HOLE,
    IN_RED,
    OUTSIDE,
    SCENE,
    ask,
    describe,
)
from tests.support.blob_model import draw_picture, encode_picture

pytestmark = pytest.mark.browser


def test_the_time_of_each_stage_is_shown(demo: Demo) -> None:
    demo.segment(SCENE)
    names = [text.split()[0] for text in demo.page.locator("#time-list li").all_inner_texts()]
    assert names == ["Decode", "Wait", "Model", "Masks", "Encode"]
    widths = demo.page.locator("#time-bar span").evaluate_all("e => e.map((s) => s.clientWidth)")
    assert len(widths) == 5
    assert all(width > 0 for width in widths)
    assert "ms in the server" in demo.by_id("time-total").inner_text()


def test_the_slider_filters_without_a_request(demo: Demo) -> None:
    demo.segment(SCENE)
    asked = len(demo.requests)
    slider = demo.page.get_by_role("slider", name="Minimum score")
    assert (slider.input_value(), slider.get_attribute("min")) == ("0.1", "0.05")
    slider.fill("0.8")
    assert demo.by_id("count").inner_text() == "1 instance"
    assert demo.by_id("filtered").inner_text() == "1 with a lower score is hidden."
    assert demo.by_id("threshold-value").inner_text() == "0.80"
    assert slider.get_attribute("aria-valuetext") == "0.80, 1 instance"
    assert [row[:3] for row in demo.shown_rows()] == ["red"]
    red, green = demo.read_pixels(IN_RED, IN_GREEN)
    assert red != (255, 0, 0)
    assert green == (0, 180, 0)
    slider.press("Home")
    assert demo.by_id("count").inner_text() == "2 instances"
    assert demo.read_pixels(IN_GREEN) != [(0, 180, 0)]
    assert len(demo.requests) == asked
    (url,) = (url for url in demo.requests if "/segment?" in url)
    assert "score_threshold=0.05" in url


def test_the_mouse_lights_an_instance_up(demo: Demo) -> None:
    demo.segment(SCENE)
    red, green = (describe(instance) for instance in ask(demo))
    tip, rows = demo.by_id("tip"), demo.page.locator("#list li")
    before = demo.read_pixels(IN_RED, IN_GREEN)
    demo.move_to(*IN_RED)
    demo.page.wait_for_selector("#tip:not([hidden])")
    assert tip.inner_text() == red
    assert demo.page.locator("#list .lit").get_attribute("aria-label") == red
    after = demo.read_pixels(IN_RED, IN_GREEN)
    assert after[0] != before[0], "the lit one is stronger"
    assert after[1] != before[1], "the others step back"
    demo.move_to(*IN_HOLE)
    demo.page.wait_for_selector("#tip", state="hidden")
    assert demo.read_pixels(IN_RED, IN_GREEN) == before
    rows.nth(1).hover()
    demo.page.wait_for_selector("#tip:not([hidden])")
    assert tip.inner_text() == green
    demo.move_to(*IN_RED)
    demo.page.mouse.down()
    demo.page.mouse.up()
    demo.move_to(*OUTSIDE)
    demo.page.wait_for_selector("#tip:not([hidden])")
    assert rows.nth(0).get_attribute("aria-selected") == "true"


def test_the_keyboard_alone_is_enough(demo: Demo) -> None:
    press = demo.page.keyboard.press
    demo.by_id("file").focus()
    press("Tab")
    assert demo.page.evaluate("document.activeElement.innerText.trim()") == "Crowded nuclei"
    demo.segment(SCENE)
    before = demo.read_pixels(IN_RED)
    box = demo.page.get_by_role("listbox", name="Instances")
    for _ in range(12):
        if box.evaluate("e => e === document.activeElement"):
            break
        press("Tab")
    chosen = demo.page.locator("#list [aria-selected=true]")
    for key, name in [("ArrowDown", "green"), ("ArrowDown", "green"), ("Home", "red")]:
        press(key)
        assert chosen.locator(".name").inner_text() == name
        assert box.get_attribute("aria-activedescendant") == chosen.get_attribute("id")
        demo.page.locator("#tip:not([hidden])", has_text=f"{name}, ").wait_for()  # drawn later
    assert demo.read_pixels(IN_RED) != before
    press("Escape")
    assert chosen.count() == 0
    assert box.get_attribute("aria-activedescendant") is None


def test_contours_are_lines_and_hit_inside(open_demo: OpenDemo) -> None:
    picture = draw_picture(80, 80, {"red": (16, 16, 48, 48)})
    picture[24:56, 24:56] = 0
    demo = open_demo("?model=contours")
    data = encode_picture(picture)
    demo.segment(data)
    line, inside = demo.read_pixels((0.25, 0.5), (0.5, 0.5))
    colour = demo.page.locator("#list .swatch").evaluate("e => getComputedStyle(e).backgroundColor")
    assert f"rgb{line}" == colour
    assert inside == BLACK
    demo.move_to(0.5, 0.5)
    demo.page.wait_for_selector("#tip:not([hidden])")
    (curve,) = ask(demo, data, "contours")
    assert demo.by_id("tip").inner_text() == describe(curve, "outline")
    assert "finds outlines" in (demo.by_id("notes").text_content() or "")


def test_the_result_is_saved_as_coco(demo: Demo, downloads: Path) -> None:
    demo.segment(SCENE, "scene.png")
    path = demo.save("Save as COCO", downloads)
    assert path.name == "scene.coco.json"
    coco = COCO(path)
    (image,) = coco.loadImgs(coco.getImgIds())
    assert (image["file_name"], image["width"], image["height"]) == ("scene.png", 80, 40)
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == ["red", "green", "blue"]
    saved = coco.loadAnns(coco.getAnnIds())
    for annotation, instance in zip(saved, ask(demo), strict=True):
        for key in ("category_id", "bbox", "area", "score"):
            assert annotation[key] == instance[key]
        mask = coco_mask.decode(instance["segmentation"])
        np.testing.assert_array_equal(coco.annToMask(annotation), mask)
    assert not coco.annToMask(saved[1])[16:24, 59:65].any(), "the hole is there"
    assert len(coco.loadRes(saved).getAnnIds()) == 2
    demo.by_id("threshold").fill("0.8")
    assert len(COCO(demo.save("Save as COCO", downloads)).getAnnIds()) == 1


def test_the_picture_is_saved_at_its_own_size(demo: Demo, downloads: Path) -> None:
    demo.segment(SCENE, "scene.png")
    path = demo.save("Save picture", downloads)
    assert path.name == "scene.segmented.png"
    saved = np.asarray(Image.open(path).convert("RGB"))
    assert saved.shape == (40, 80, 3)
    assert tuple(saved[20, 16]) not in (BLACK, (255, 0, 0))
    assert tuple(saved[20, 62]) == tuple(saved[4, 40]) == BLACK


def test_a_dark_picture_can_be_brightened(demo: Demo) -> None:
    dark = (np.tile(np.linspace(4, 40, 80), (40, 1))[..., None] * [1, 1, 1]).astype(np.uint8)
    demo.segment(encode_picture(dark))
    assert demo.by_id("nothing").is_visible()
    assert max(demo.read_pixels((0.98, 0.5))[0]) < 45
    demo.by_id("brighten").check()
    assert min(demo.read_pixels((0.98, 0.5))[0]) > 240


def test_a_phone_needs_no_sideways_scrolling(open_demo: OpenDemo) -> None:
    demo = open_demo(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    width = "document.documentElement.scrollWidth"
    assert demo.page.evaluate(width) == 360
    demo.choose(b"words", "a-very-long-name-without-any-place-to-break-it-in-two.jpg")
    demo.page.get_by_role("alert").wait_for()
    assert demo.page.evaluate(width) == 360
    demo.segment(SCENE, "a-very-long-name-without-any-place-to-break-it-in-two.png")
    assert demo.page.evaluate(width) == 360
    box = demo.by_id("canvas").bounding_box()
    assert box is not None
    assert box["width"] > 300
    demo.page.touchscreen.tap(box["x"] + 0.2 * box["width"], box["y"] + 0.5 * box["height"])
    demo.page.wait_for_selector("#tip:not([hidden])")
    assert demo.by_id("tip").inner_text().startswith("red")


_CONTRASTS = """
() => {
  const context = document.createElement("canvas").getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const luminance = (name) => {
    context.fillStyle = style.getPropertyValue(name);
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = Array.from(context.getImageData(0, 0, 1, 1).data).map((v) => {
      const s = v / 255;
      return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const pairs = [["--ink", "--surface"], ["--ink", "--ground"], ["--ink", "--accent-soft"],
    ["--muted", "--surface"], ["--muted", "--ground"], ["--muted", "--accent-soft"],
    ["--muted", "--warn-soft"], ["--accent", "--surface"], ["--accent-ink", "--accent"],
    ["--warn", "--warn-soft"]];
  return Object.fromEntries(pairs.map(([a, b]) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return [`${a} on ${b}`, (high + 0.05) / (low + 0.05)];
  }));
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(open_demo: OpenDemo, scheme: str) -> None:
    demo = open_demo(color_scheme=scheme)
    red, *_ = (
        int(value)
        for value in demo.page.evaluate("getComputedStyle(document.body).backgroundColor.slice(4)")
        .rstrip(")")
        .split(",")
    )
    assert (red < 60) == (scheme == "dark")
    contrasts = demo.page.evaluate(_CONTRASTS)
    assert {pair: ratio for pair, ratio in contrasts.items() if ratio < 4.5} == {}


def test_the_description_of_the_api_is_shown(open_demo: OpenDemo) -> None:
    demo = open_demo("docs")
    demo.page.locator(".opblock-post", has_text="segment").first.wait_for()
    assert any(url.endswith("/openapi.json") for url in demo.requests)
