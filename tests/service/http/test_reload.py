from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import State

from service.http.keys import KeyRing, add_key
from service.http.reload import Reloader


class HeldSegmenter:
    """Counts the scans of its repository, which last until they are let go."""

    def __init__(self) -> None:
        self.begun = 0
        self.go = asyncio.Event()

    async def rescan(self) -> None:
        self.begun += 1
        await self.go.wait()


def build_state(keys: KeyRing | None = None) -> tuple[State, Any]:
    segmenter = HeldSegmenter()
    return State({"keys": keys, "segmenter": segmenter}), segmenter


async def finish(reloader: Reloader) -> None:
    assert reloader._task is not None
    await asyncio.wait_for(reloader._task, 10)


async def test_signals_during_a_reload_are_one_more_afterwards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    state, segmenter = build_state()
    reloader = Reloader(state)
    reloader.start()
    await asyncio.sleep(0)
    for _ in range(100):
        reloader.start()
    assert segmenter.begun == 1
    segmenter.go.set()
    await finish(reloader)
    assert segmenter.begun == 2
    assert caplog.text.count("has been checked for changes") == 2
    reloader.start()
    await finish(reloader)
    assert segmenter.begun == 3


async def test_keys_are_read_again_even_if_the_file_looks_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    first = add_key(file, "first")
    ring = KeyRing(file, clock=lambda: 0.0)  # the time of its own next check never comes
    state, segmenter = build_state(ring)
    segmenter.go.set()
    second = add_key(file, "second")
    assert ring.find(second) is None
    reloader = Reloader(state)
    reloader.start()
    await finish(reloader)
    assert ring.find(first) and ring.find(second)
    file.write_text("{")
    reloader.start()
    await finish(reloader)
    assert ring.find(first) and ring.find(second)
    assert "the keys read before stay valid" in caplog.text
    assert segmenter.begun == 2  # the repository is scanned nevertheless
