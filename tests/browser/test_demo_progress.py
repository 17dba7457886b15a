"""The demo page before and while a large image is processed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.load import read_metrics
from tests.browser.conftest import OpenDemo
from tests.browser.demo import Demo
from tests.browser.scene import SCENE, count_segmentations
from tests.support.blob_model import draw_picture, encode_picture, model_config, publish
from tests.support.server import CPU_FLAGS, ServerProcess, run_server
from tests.support.slow_model import build_slow_graph, publish_graph
from tests.support.waiting import poll_until

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Route

pytestmark = pytest.mark.browser

ROUNDS = 10_000
"""About 0.1 s for each tile."""
MAX_CANVASES = 500
CANCELLED = 'solo_cancelled_images_total{model="slow",reason="client_left"}'
TILES = 'solo_batch_size_sum{model="slow",version="1"}'
STEP_PX = 48
"""Distance of two tiles of 64 px."""


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with tiles: a fast model, one that returns two instances, and a slow one."""
    folder = tmp_path_factory.mktemp("tiled")
    repo = folder / "repo"
    publish(repo, "fast")
    few = {**model_config(b"")["postprocess"], "max_instances": 2}
    publish(repo, "few", postprocess=few)
    publish_graph(repo, "slow", build_slow_graph(rounds=ROUNDS))
    flags = ("--max-batch", "1", "--max-image-canvases", str(MAX_CANVASES))
    with run_server(
        folder / "server.log", "--model-repo", str(repo), *CPU_FLAGS, *flags
    ) as running:
        yield running


OpenTiled = OpenDemo


@pytest.fixture
def open_tiled(open_demo: OpenDemo, tiled: ServerProcess) -> OpenTiled:
    """Opens the page with a model of the server `tiled`."""
    return lambda model: open_demo(f"?model={model}", url=tiled.url)


def draw_tiles(rows: int, columns: int) -> bytes:
    """A picture of so many tiles, with a red box in the first."""
    height, width = (16 + STEP_PX * count for count in (rows, columns))
    return encode_picture(draw_picture(height, width, {"red": (8, 8, 30, 30)}))


def read_counts(texts: list[str]) -> list[tuple[int, int]]:
    """(done, all) of each text "3 of 12 tiles..."."""
    found = [re.match(r"([\d,]+) of ([\d,]+) tiles", text) for text in texts]
    assert all(found), texts
    return [(int(match[1]), int(match[2])) for match in found if match]


_RECORD = """
(ids) => {
  window.texts = Object.fromEntries(ids.map((id) => [id, []]));
  for (const id of ids) {
    const element = document.getElementById(id);
    new MutationObserver(() => window.texts[id].push(element.textContent))
      .observe(element, { childList: true, characterData: true, subtree: true });
  }
}
"""


def record_texts(demo: Demo, *ids: str) -> None:
    """Keeps every text that the elements get from now on."""
    demo.page.evaluate(_RECORD, list(ids))


def read_texts(demo: Demo, name: str) -> list[str]:
    texts: list[str] = demo.page.evaluate("(id) => window.texts[id]", name)
    return texts


def await_progress(demo: Demo) -> Locator:
    """Waits until the first tile is done."""
    shown = demo.page.locator("#progress-text", has_text=re.compile(r"^[1-9]\d* of "))
    shown.wait_for()
    return shown


def test_progress_is_shown_until_the_result(open_tiled: OpenTiled) -> None:
    demo = open_tiled("slow")
    record_texts(demo, "progress-text", "announcer")
    demo.choose(draw_tiles(5, 6), "plate.png")
    await_progress(demo)
    bar = demo.page.get_by_role("progressbar", name="Progress")
    assert bar.is_visible()
    assert bar.get_attribute("aria-describedby") == "progress-text"
    assert bar.evaluate("e => e.max") == 30
    assert 0 < bar.evaluate("e => e.value") <= 30
    assert demo.by_id("busy-text").inner_text() == "Segmenting plate.png"
    demo.await_result()
    texts = read_texts(demo, "progress-text")
    counts = read_counts(texts)
    done = [count for count, _ in counts]
    assert done == sorted(done)
    assert len(set(done)) > 2
    assert {canvases for _, canvases in counts} == {30}
    assert any(re.search(r"tiles, about \d+ s left$", text) for text in texts), texts
    announced = read_texts(demo, "announcer")
    assert announced[0] == "Segmenting plate.png."
    assert announced[-1] == "1 instance in plate.png."
    spoken = read_counts(announced[1:-1])
    assert 1 <= len(spoken) <= 4, "a screen reader hears each quarter at most once"
    assert len(demo.shown_rows()) == 1
    assert demo.by_id("truncation").inner_text().strip() == ""


def test_an_image_of_one_canvas_has_no_progress_bar(open_tiled: OpenTiled) -> None:
    demo = open_tiled("slow")
    record_texts(demo, "progress-text")
    demo.segment(draw_tiles(1, 1))
    assert read_texts(demo, "progress-text") == []
    assert demo.by_id("progress").get_attribute("hidden") is not None


@pytest.mark.parametrize("way", ["button", "Escape", "another image"])
def test_cancel_stops_the_work_at_the_server(
    open_tiled: OpenTiled, tiled: ServerProcess, way: str
) -> None:
    before = read_metrics(tiled.url)
    demo = open_tiled("slow")
    demo.choose(draw_tiles(9, 11), "plate.png")
    await_progress(demo)
    if way == "button":
        demo.page.get_by_role("button", name="Cancel").click()
    elif way == "Escape":
        demo.page.keyboard.press("Escape")
    else:
        demo.segment(draw_tiles(1, 1), "next.png")
        assert demo.by_id("about").inner_text().startswith("next.png")
    if way != "another image":
        assert demo.page.locator("body").get_attribute("data-state") == "empty"
        assert demo.by_id("announcer").inner_text() == "Cancelled."
    assert demo.by_id("busy").is_hidden()
    assert demo.page.get_by_role("alert").is_hidden()
    cancelled = before.get(CANCELLED, 0) + 1
    poll_until(
        lambda: read_metrics(tiled.url).get(CANCELLED) == cancelled, timeout_s=20, pause_s=0.1
    )
    demo.page.get_by_role("combobox", name="Model").select_option("slow")
    demo.segment(draw_tiles(1, 1))
    assert read_metrics(tiled.url)[TILES] - before.get(TILES, 0) < 99


def test_a_large_image_is_sent_after_a_question(open_tiled: OpenTiled) -> None:
    demo = open_tiled("fast")
    dialog = demo.page.get_by_role("dialog")
    large = draw_tiles(20, 21)
    demo.choose(large, "large.png")
    dialog.wait_for()
    assert dialog.locator("p").inner_text() == "This image needs 420 tiles"
    assert demo.by_id("busy").is_hidden()
    assert count_segmentations(demo) == 0
    dialog.get_by_role("button", name="Send").click()
    demo.await_result()
    assert count_segmentations(demo) == 1
    assert demo.by_id("about").inner_text().startswith("large.png")
    demo.choose(large, "again.png")
    dialog.wait_for()
    text = dialog.locator("p").inner_text()
    assert re.fullmatch(r"This image needs 420 tiles \(about \d+ (s|minutes?)\)", text), text
    demo.page.keyboard.press("Escape")  # is not taken for the answer to the first question
    demo.page.wait_for_selector("body[data-state=empty]")
    assert count_segmentations(demo) == 1


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_a_large_image_need_not_be_sent(open_tiled: OpenTiled, way: str) -> None:
    demo = open_tiled("fast")
    dialog = demo.page.get_by_role("dialog")
    for _ in range(2):  # the answer of the first question is not that of the second
        demo.choose(draw_tiles(10, 11))
        dialog.wait_for()
        if way == "button":
            dialog.get_by_role("button", name="Cancel").click()
        else:
            demo.page.keyboard.press("Escape")
        demo.page.wait_for_selector("body[data-state=empty]")
        assert dialog.is_hidden()
        assert demo.by_id("busy").is_hidden()
        assert demo.by_id("panel").get_attribute("aria-busy") == "false"
    assert count_segmentations(demo) == 0


def test_another_image_withdraws_the_question(open_tiled: OpenTiled) -> None:
    demo = open_tiled("fast")
    dialog = demo.page.get_by_role("dialog")
    demo.choose(draw_tiles(10, 11), "first.png")
    dialog.wait_for()
    demo.choose(draw_tiles(10, 12), "second.png")
    demo.page.locator("#estimate-text", has_text="120 tiles").wait_for()
    dialog.get_by_role("button", name="Send").click()
    demo.await_result()
    assert demo.by_id("about").inner_text().startswith("second.png")
    demo.choose(draw_tiles(10, 11), "third.png")
    dialog.wait_for()
    demo.segment(SCENE, "small.png")
    assert dialog.is_hidden()
    assert demo.by_id("about").inner_text().startswith("small.png")
    assert count_segmentations(demo) == 2


_ASK_TWICE = """
async () => {
  const { confirmSending } = await import("/web/busy.js");
  const first = new AbortController();
  const answers = [];
  const keep = (name) => [(send) => answers.push([name, send]), () => answers.push([name, null])];
  confirmSending("first", first.signal).then(...keep("first"));
  first.abort();
  confirmSending("second", new AbortController().signal).then(...keep("second"));
  for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
  document.getElementById("estimate-send").click();
  for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
  return answers;
}
"""


def test_a_withdrawn_question_does_not_answer_the_next_one(open_tiled: OpenTiled) -> None:
    assert open_tiled("fast").page.evaluate(_ASK_TWICE) == [["first", None], ["second", True]]


def test_an_image_of_a_hundred_tiles_is_sent_at_once(open_tiled: OpenTiled) -> None:
    demo = open_tiled("fast")
    demo.segment(draw_tiles(10, 10))
    assert demo.by_id("estimate").is_hidden()
    assert count_segmentations(demo) == 1


def test_an_image_above_the_servers_limit_is_refused_with_the_numbers(
    open_tiled: OpenTiled,
) -> None:
    demo = open_tiled("fast")
    demo.choose(draw_tiles(20, 26))
    demo.page.get_by_role("dialog").get_by_role("button", name="Send").click()
    alert = demo.page.get_by_role("alert")
    alert.wait_for()
    text = alert.inner_text()
    assert "This image needs more tiles than the server allows." in text
    assert f"needs 520 canvases, the server allows {MAX_CANVASES}" in text
    assert demo.by_id("retry").is_hidden()
    assert demo.page.locator("body").get_attribute("data-state") == "empty"


def test_a_truncated_result_says_how_much_is_missing(open_tiled: OpenTiled) -> None:
    demo = open_tiled("few")
    boxes = {"red": (2, 2, 16, 16), "green": (24, 2, 16, 16), "blue": (2, 24, 16, 16)}
    demo.segment(encode_picture(draw_picture(48, 48, boxes)), "three.png")
    first, second = demo.page.locator("#truncation p").all()
    assert first.inner_text() == "2 of 3 objects shown (max_instances)"
    assert second.inner_text().startswith("3 have a score of at least 0.05. Those below ")
    said = "2 instances in three.png. 2 of 3 objects shown (max_instances)"
    assert demo.by_id("announcer").inner_text() == said
    demo.by_id("threshold").fill("1")
    assert demo.shown_rows() == []
    assert first.inner_text() == "", "above the slider's score nothing is missing"
    assert second.inner_text() == ""
    demo.by_id("threshold").fill("0.05")
    assert first.inner_text() == "2 of 3 objects shown (max_instances)"


def test_an_error_during_the_work_is_explained(open_tiled: OpenTiled) -> None:
    """The deadline passes after the stream has begun: the status is in its last line."""
    demo = open_tiled("slow")

    def hurry(route: Route) -> None:
        route.continue_(headers={**route.request.headers, "x-timeout-ms": "1500"})

    demo.page.route("**/segment?*", hurry, times=1)
    demo.choose(draw_tiles(9, 11))
    alert = demo.page.get_by_role("alert")
    alert.wait_for()
    assert "The server did not finish in time." in alert.inner_text()
    assert re.search(r"\d+ of 99 canvases were done", alert.inner_text())
    assert demo.by_id("retry").is_visible()


@pytest.mark.parametrize(
    "body", ["", '{"progress": {"canvases_done": 3, "canvases": 9, "elapsed_s": 1}}\n{"res']
)
def test_an_answer_that_ends_early_is_a_lost_connection(open_tiled: OpenTiled, body: str) -> None:
    demo = open_tiled("fast")
    demo.page.route(
        "**/segment?*",
        lambda route: route.fulfill(body=body, content_type="application/x-ndjson"),
        times=1,
    )
    demo.choose(SCENE)
    alert = demo.page.get_by_role("alert")
    alert.wait_for()
    assert "The connection to the server was lost." in alert.inner_text()
    demo.page.get_by_role("button", name="Try again").click()
    demo.await_result()
    assert len(demo.shown_rows()) == 2


def test_a_server_that_stops_is_a_lost_connection(open_demo: OpenDemo, tmp_path: Path) -> None:
    publish_graph(tmp_path / "repo", "slow", build_slow_graph(rounds=ROUNDS))
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS, "--max-batch", "1")
    with run_server(tmp_path / "server.log", *flags) as server:
        demo = open_demo(url=server.url)
        demo.choose(draw_tiles(9, 11))
        await_progress(demo)
        server.process.kill()
        alert = demo.page.get_by_role("alert")
        alert.wait_for()
        assert "The connection to the server was lost." in alert.inner_text()


def test_an_answer_in_plain_json_is_shown(open_tiled: OpenTiled) -> None:
    demo = open_tiled("fast")

    def ask_for_json(route: Route) -> None:
        route.continue_(headers={**route.request.headers, "accept": "application/json"})

    demo.page.route("**/segment?*", ask_for_json)
    with demo.page.expect_response("**/segment?*") as answered:
        demo.segment(SCENE)
    assert answered.value.headers["content-type"] == "application/json"
    assert len(demo.shown_rows()) == 2


def test_progress_fits_on_a_phone(open_demo: OpenDemo, tiled: ServerProcess) -> None:
    small = {"width": 360, "height": 740}
    demo = open_demo("?model=slow", url=tiled.url, viewport=small, is_mobile=True, has_touch=True)
    demo.choose(draw_tiles(9, 11), "a-very-long-name-without-any-place-to-break-it-in-two.png")
    shown = await_progress(demo)
    for element in (shown, demo.by_id("progress"), demo.by_id("cancel")):
        box = element.bounding_box()
        assert box is not None
        assert 0 <= box["x"] < box["x"] + box["width"] <= 360
    assert shown.evaluate("e => e.scrollWidth <= e.clientWidth"), "nothing is cut off"
    assert demo.page.evaluate("document.documentElement.scrollWidth") == 360
    demo.by_id("cancel").click()
