from __future__ import annotations

import threading
from typing import Any, cast

from service.predict.progress import CanvasProgress
from solo_client import Progress


class FakeBar:
    def __init__(self) -> None:
        self.shown: list[str] = []

    def set_postfix_str(self, text: str) -> None:
        self.shown.append(text)


def progress(done: int, total: int) -> Progress:
    return Progress(done, total, 1.0, None)


def test_large_images_in_progress_are_added_up() -> None:
    bar, canvases = FakeBar(), CanvasProgress()
    canvases.update(progress(0, 441))  # there is no bar yet
    canvases.bar = cast(Any, bar)
    canvases.update(progress(12, 441))
    thread = threading.Thread(target=canvases.update, args=[progress(1, 9)])
    thread.start()
    thread.join()
    canvases.update(progress(441, 441))
    assert bar.shown == ["12/441 canvases", "13/450 canvases", "1/9 canvases"]


def test_small_images_show_nothing_and_replace_a_large_one_that_failed() -> None:
    bar, canvases = FakeBar(), CanvasProgress()
    canvases.bar = cast(Any, bar)
    canvases.update(progress(0, 1))
    canvases.update(progress(1, 1))
    assert bar.shown == []
    canvases.update(progress(2, 9))
    canvases.update(progress(0, 1))
    assert bar.shown == ["2/9 canvases", ""]
