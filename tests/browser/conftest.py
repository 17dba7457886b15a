from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.demo import Demo
from tests.support.blob_model import KEEP_RATIO_INPUT, publish
from tests.support.server import ServerProcess, run_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with four models: tiles, whole images, contours, and one that is refused."""
    folder = tmp_path_factory.mktemp("browser")
    repo = folder / "repo"
    publish(repo)
    publish(repo, "contours", task="contour", input=KEEP_RATIO_INPUT)
    publish(repo, "wide", input=KEEP_RATIO_INPUT)
    (publish(repo, "broken") / "1/model.onnx").write_bytes(b"not a graph")
    flags = ("--device", "cpu", "--threads", "1", "--pool-threads", "1")
    with run_server(folder / "server.log", "--model-repo", str(repo), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window.

    It is closed after each module: its event loop runs in this thread, where tests of asyncio
    would fail meanwhile.
    """
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def page(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    """A page of the server, from which its scripts are imported."""
    opened = browser.new_page()
    opened.goto(server.url)
    yield opened
    opened.close()


OpenDemo = Callable[..., Demo]


@pytest.fixture
def open_demo(browser: Browser, server: ServerProcess) -> Iterator[OpenDemo]:
    """Opens the demo page; then checks that no script failed and no other host was asked."""
    opened: list[Demo] = []

    def open_page(path: str = "", url: str = server.url, **options: Any) -> Demo:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(20_000)
        demo = Demo(context.new_page(), url)
        opened.append(demo)
        demo.page.goto(f"{url}/{path}")
        return demo

    yield open_page
    for demo in opened:
        demo.page.context.close()
    for demo in opened:
        assert demo.failures == []
        assert [url for url in demo.requests if not url.startswith(f"{demo.url}/")] == []


@pytest.fixture
def demo(open_demo: OpenDemo) -> Demo:
    """The demo page on a desktop, with model `wide`."""
    return open_demo("?model=wide")


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    folder.mkdir()
    return folder
