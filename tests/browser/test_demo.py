"""The demo page in a real browser, against the real server."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tests.browser.conftest import OpenDemo
from tests.browser.demo import Demo
from tests.support.blob_model import draw_picture, encode_picture

if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = pytest.mark.browser

BLACK = (0, 0, 0)
IN_RED, IN_GREEN, IN_HOLE, OUTSIDE = (0.2, 0.5), (0.65, 0.5), (0.775, 0.5), (0.5, 0.1)
"""Points of the picture as shares of its size; the hole is in the green box."""


def draw_scene() -> bytes:
    """80x40 px: a red box, and a darker green one with a hole."""
    picture = draw_picture(40, 80, {"red": (8, 8, 20, 24), "green": (48, 4, 28, 32)})
    picture[..., 1][picture[..., 1] > 0] = 180
    picture[12:28, 56:68] = 0
    return encode_picture(picture)


SCENE = draw_scene()


def ask(demo: Demo, data: bytes = SCENE, model: str = "wide") -> list[dict[str, Any]]:
    """The instances that the server answers to anyone."""
    response = httpx.post(f"{demo.url}/segment", params={"model": model}, content=data, timeout=60)
    instances: list[dict[str, Any]] = response.json()["results"][0]["instances"]
    return instances


def describe(instance: dict[str, Any], what: str = "area") -> str:
    """How the page says an instance."""
    score, area = instance["score"], instance["area"]
    return f"{instance['category']}, score {score:.2f}, {what} {area:,} px"


def count_segmentations(demo: Demo) -> int:
    return sum("/segment?" in url for url in demo.requests)


def test_an_upload_is_segmented_and_drawn(demo: Demo) -> None:
    demo.segment(SCENE, "scene.png")
    assert demo.by_id("count").inner_text() == "2 instances"
    assert "scene.png, 80 × 40 px. wide version 1." in demo.by_id("about").inner_text()
    assert demo.shown_rows() == [describe(instance) for instance in ask(demo)]
    red, green, hole, outside = demo.read_pixels(IN_RED, IN_GREEN, IN_HOLE, OUTSIDE)
    assert hole == outside == BLACK
    assert red != (255, 0, 0)
    assert green != (0, 180, 0)
    demo.by_id("show-masks").uncheck()
    red, green, hole = demo.read_pixels(IN_RED, IN_GREEN, IN_HOLE)
    assert (red, green, hole) == ((255, 0, 0), (0, 180, 0), BLACK)
    assert "2 instances" in (demo.by_id("canvas").get_attribute("aria-label") or "")
    assert demo.by_id("announcer").inner_text() == "2 instances in scene.png."


def test_the_time_of_each_stage_is_shown(demo: Demo) -> None:
    demo.segment(SCENE)
    names = [text.split()[0] for text in demo.page.locator("#time-list li").all_inner_texts()]
    assert names == ["Decode", "Wait", "Model", "Masks", "Encode"]
    widths = demo.page.locator("#time-bar span").evaluate_all("e => e.map((s) => s.clientWidth)")
    assert len(widths) == 5
    assert all(width > 0 for width in widths)
    assert "ms in the server" in demo.by_id("time-total").inner_text()


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_an_image_can_be_pasted_and_dropped(demo: Demo, kind: str) -> None:
    data = base64.b64encode(SCENE).decode("ascii")
    demo.hand_over(kind, {"name": "handed.png", "base64": data})
    demo.await_result()
    assert demo.by_id("about").inner_text().startswith("handed.png")
    assert len(demo.shown_rows()) == 2
    demo.hand_over(kind, None)
    problem = "The clipboard holds no image." if kind == "paste" else "That was no file."
    assert problem in demo.page.get_by_role("alert").inner_text()
    assert len(demo.shown_rows()) == 2, "what was there stays"
    assert count_segmentations(demo) == 1


@pytest.mark.parametrize(
    ("name", "file"),
    [("Crowded nuclei", "crowded"), ("Sparse nuclei", "sparse"), ("Stained tissue", "tissue")],
)
def test_a_sample_is_segmented(demo: Demo, name: str, file: str) -> None:
    demo.page.get_by_role("button", name=name).click()
    demo.await_result()
    data = httpx.get(f"{demo.url}/web/samples/{file}.jpg").content
    assert demo.shown_rows() == [describe(instance) for instance in ask(demo, data)]
    assert demo.by_id("nothing").is_visible() == (not demo.shown_rows())
    assert count_segmentations(demo) == 1


def test_the_slider_filters_without_a_request(demo: Demo) -> None:
    demo.segment(SCENE)
    asked = len(demo.requests)
    slider = demo.page.get_by_role("slider", name="Least score")
    assert (slider.input_value(), slider.get_attribute("min")) == ("0.1", "0.05")
    slider.fill("0.8")
    assert demo.by_id("count").inner_text() == "1 instance"
    assert demo.by_id("weaker").inner_text() == "1 weaker one is hidden."
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
        assert demo.by_id("tip").inner_text().startswith(name)
    assert demo.read_pixels(IN_RED) != before
    press("Escape")
    assert chosen.count() == 0
    assert box.get_attribute("aria-activedescendant") is None


def test_a_text_file_named_jpg_is_explained(demo: Demo) -> None:
    demo.choose(b"these are words, not an image", "words.jpg")
    alert = demo.page.get_by_role("alert")
    alert.wait_for()
    assert "The server cannot read this file as an image." in alert.inner_text()
    assert "its 29 bytes start with" in alert.inner_text()
    assert demo.by_id("busy").is_hidden()
    assert demo.by_id("retry").is_hidden()
    demo.segment(SCENE)
    assert alert.is_hidden()
    assert len(demo.shown_rows()) == 2


def test_a_full_server_can_be_asked_again(demo: Demo) -> None:
    def refuse(route: Route) -> None:
        error = {"code": "overloaded", "message": "256 images are in work"}
        route.fulfill(status=503, body=json.dumps({"error": error}), content_type="text/json")

    demo.page.route("**/segment?*", refuse, times=1)
    demo.choose(SCENE)
    alert = demo.page.get_by_role("alert")
    alert.wait_for()
    assert "too much to do right now" in alert.inner_text()
    demo.page.get_by_role("button", name="Try again").click()
    demo.await_result()
    assert len(demo.shown_rows()) == 2


def test_a_server_that_is_gone_is_said(demo: Demo) -> None:
    demo.page.route("**/segment?*", lambda route: route.abort())
    demo.choose(SCENE)
    alert = demo.page.get_by_role("alert")
    alert.wait_for()
    assert "The server cannot be reached." in alert.inner_text()


def test_waiting_is_shown_and_can_be_cancelled(demo: Demo) -> None:
    demo.page.route("**/segment?*", lambda route: None)
    demo.choose(SCENE, "slow.png")
    demo.by_id("busy").wait_for()
    assert demo.by_id("busy-text").inner_text() == "Segmenting slow.png"
    assert demo.by_id("panel").get_attribute("aria-busy") == "true"
    assert demo.read_pixels(IN_RED) == [(255, 0, 0)], "the image is there already"
    demo.page.get_by_role("button", name="Cancel").click()
    assert demo.by_id("busy").is_hidden()
    assert demo.by_id("panel").get_attribute("aria-busy") == "false"
    assert demo.page.get_by_role("alert").count() == 0
    demo.page.unroute("**/segment?*")
    demo.segment(SCENE)
    assert len(demo.shown_rows()) == 2


def test_a_model_can_be_chosen(open_demo: OpenDemo) -> None:
    demo = open_demo()
    select = demo.page.get_by_role("combobox", name="Model")
    options = select.locator("option")
    options.first.wait_for(state="attached")
    assert options.all_inner_texts() == ["blobs", "broken (not usable)", "contours", "wide"]
    assert options.nth(1).is_disabled()
    demo.segment(SCENE)
    assert "blobs version 1" in demo.by_id("about").inner_text()
    assert "in tiles" in (demo.by_id("notes").text_content() or "")
    select.select_option("wide")
    demo.page.locator("#about", has_text="wide version 1").wait_for()
    assert demo.by_id("notes").is_hidden()
    asked = [url for url in demo.requests if "/segment?" in url]
    assert ["model=blobs" in asked[0], "model=wide" in asked[1], len(asked)] == [True, True, 2]


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


def turn_scene(orientation: int) -> bytes:
    """The scene as a camera stores it that was held in one of EXIF's eight ways."""
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    scene: Image.Image = Image.open(io.BytesIO(SCENE))
    if orientation in stored:
        scene = scene.transpose(stored[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    scene.save(file, "JPEG", quality=95, subsampling=0, exif=exif)
    return file.getvalue()


def test_turned_photos_line_up(demo: Demo) -> None:
    for orientation in range(1, 9):
        name = f"photo-{orientation}.jpg"
        demo.choose(turn_scene(orientation), name)
        demo.page.locator("#about", has_text=f"{name}, 80 × 40 px").wait_for()
        demo.by_id("show-masks").check()
        assert demo.by_id("notes").is_hidden(), "browser and server agree on the size"
        lit = demo.read_pixels(IN_RED, IN_GREEN)
        demo.by_id("show-masks").uncheck()
        plain = demo.read_pixels(IN_RED, IN_GREEN)
        np.testing.assert_allclose(plain, [(255, 0, 0), (0, 180, 0)], atol=12, err_msg=name)
        assert (lit[0] != plain[0], lit[1] != plain[1]) == (True, True), name


@pytest.mark.parametrize(
    ("instead", "note"),
    [
        ("() => Promise.reject(new Error('no such format'))", "cannot show the image"),
        ("() => real(new ImageData(40, 80))", "shows the image as 40 × 80 px"),
    ],
    ids=["not shown", "shown otherwise"],
)
def test_masks_are_never_drawn_on_a_picture_they_do_not_fit(
    demo: Demo, instead: str, note: str
) -> None:
    script = f"const real = createImageBitmap; window.createImageBitmap = {instead};"
    demo.page.evaluate(f"() => {{ {script} }}")
    demo.segment(SCENE)
    assert note in demo.by_id("notes").inner_text()
    width, height = demo.by_id("canvas").evaluate("e => [e.width, e.height]")
    assert width == 2 * height
    red, hole = demo.read_pixels(IN_RED, IN_HOLE)
    assert red != BLACK
    assert hole == BLACK


def test_a_large_image_is_scaled_to_the_screen(demo: Demo) -> None:
    picture = draw_picture(2400, 3600, {"red": (360, 480, 900, 1440)})
    demo.segment(encode_picture(picture))
    assert "3600 × 2400 px" in demo.by_id("about").inner_text()
    width, height = demo.by_id("canvas").evaluate("e => [e.width, e.height]")
    assert max(width, height) < 1280
    assert width / height == pytest.approx(1.5, abs=0.01)
    assert demo.read_pixels((0.2, 0.5)) != [(255, 0, 0)]
    assert demo.read_pixels((0.6, 0.5)) == [BLACK]


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
