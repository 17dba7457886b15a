"""Images find their way into the demo page, and are drawn as the server saw them."""

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

from service.http.keys import add_key
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
    count_segmentations,
    describe,
)
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import run_server
from tests.support.waiting import poll_until

if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = pytest.mark.browser


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


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_an_image_can_be_pasted_and_dropped(demo: Demo, kind: str) -> None:
    data = base64.b64encode(SCENE).decode("ascii")
    demo.hand_over(kind, {"name": "handed.png", "base64": data})
    demo.await_result()
    assert demo.by_id("about").inner_text().startswith("handed.png")
    assert len(demo.shown_rows()) == 2
    demo.hand_over(kind, None)
    problem = "The clipboard has no image." if kind == "paste" else "This is not a file."
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
        error = {"code": "overloaded", "message": "256 canvases are in flight"}
        route.fulfill(status=503, body=json.dumps({"error": error}), content_type="text/json")

    demo.page.route("**/segment?*", refuse, times=1)
    demo.choose(SCENE)
    alert = demo.page.get_by_role("alert")
    alert.wait_for()
    assert "The server is overloaded." in alert.inner_text()
    demo.page.get_by_role("button", name="Try again").click()
    demo.await_result()
    assert len(demo.shown_rows()) == 2


def test_a_server_that_is_gone_is_said(demo: Demo) -> None:
    demo.page.route("**/segment?*", lambda route: route.abort())
    demo.choose(SCENE)
    alert = demo.page.get_by_role("alert")
    alert.wait_for()
    assert "The server cannot be reached." in alert.inner_text()


def test_a_model_that_is_gone_is_explained(demo: Demo) -> None:
    demo.segment(SCENE)
    unknown = httpx.get(f"{demo.url}/v2/models/gone")
    demo.page.route("**/v2/models/blobs", lambda r: r.fulfill(status=404, json=unknown.json()))
    demo.page.get_by_role("combobox", name="Model").select_option("blobs")
    alert = demo.page.get_by_role("alert")
    alert.wait_for()
    assert "no longer has this model" in alert.inner_text()
    assert "there is no model 'gone'" in alert.inner_text()
    assert len(demo.shown_rows()) == 2, "what was there stays"


def test_a_key_can_be_given_where_the_server_asks_for_one(
    open_demo: OpenDemo, tmp_path: Path
) -> None:
    publish(tmp_path / "repo")
    key = add_key(tmp_path / "keys.json", "visitor")
    flags = ("--model-repo", str(tmp_path / "repo"), "--keys-file", str(tmp_path / "keys.json"))
    with run_server(tmp_path / "server.log", *flags, "--device", "cpu", "--threads", "1") as server:
        demo = open_demo(url=server.url)
        demo.choose(SCENE)
        field = demo.page.get_by_label("API key")
        field.wait_for()
        assert "requires an API key" in demo.page.get_by_role("alert").inner_text()
        for given in ("wrong", key):
            field.fill(given)
            field.press("Enter")
            demo.by_id("busy").wait_for(state="hidden")
            assert field.is_visible() == (given == "wrong")
        assert len(demo.shown_rows()) == 2
        assert not [url for url in demo.requests if key in url]


def test_waiting_is_shown_and_can_be_cancelled(demo: Demo) -> None:
    demo.page.route("**/segment?*", lambda route: None)
    demo.choose(SCENE, "slow.png")
    demo.by_id("busy").wait_for()
    assert demo.by_id("busy-text").inner_text() == "Segmenting slow.png"
    assert demo.by_id("panel").get_attribute("aria-busy") == "true"
    # The image is shown before the answer has come.
    poll_until(lambda: demo.read_pixels(IN_RED) == [(255, 0, 0)], timeout_s=30, pause_s=0.1)
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
    assert options.all_inner_texts() == ["blobs", "broken (not available)", "contours", "wide"]
    assert options.nth(1).is_disabled()
    demo.segment(SCENE)
    assert "blobs version 1" in demo.by_id("about").inner_text()
    assert "in tiles" in (demo.by_id("notes").text_content() or "")
    select.select_option("wide")
    demo.page.locator("#about", has_text="wide version 1").wait_for()
    assert demo.by_id("notes").is_hidden()
    asked = [url for url in demo.requests if "/segment?" in url]
    assert ["model=blobs" in asked[0], "model=wide" in asked[1], len(asked)] == [True, True, 2]


KINDS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
}


def turn_scene(orientation: int, kind: str) -> bytes:
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
    scene.save(file, exif=exif, **KINDS[kind])
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_turned_photos_line_up(demo: Demo, kind: str) -> None:
    for orientation in range(1, 9):
        name = f"photo-{orientation}.{kind}"
        demo.choose(turn_scene(orientation, kind), name)
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
