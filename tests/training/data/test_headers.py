from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import headers
from training.data.headers import read_sizes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOLO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(path: Path, height: int, width: int, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, exif=exif)


def test_sizes_are_as_the_image_is_seen(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp"):
        save(tmp_path / name, 20, 30)
        save(tmp_path / f"turned_{name}", 20, 30, 6)
        assert read_sizes(tmp_path, [name, f"turned_{name}"]) == [(20, 30), (30, 20)]
    assert read_sizes(tmp_path, []) == []


def test_a_header_behind_a_long_segment(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", 20, 30)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:2] + (b"\xff\xee\xff\xff" + bytes(65533)) * 3 + data[2:])
    assert read_sizes(tmp_path, ["a.jpg"]) == [(20, 30)]


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 20, 30)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = ["a.png", "cut.png", "empty.png", "folder", "pipe", "none.png", "a\0b", "n" * 5000]
    first, *others = read_sizes(tmp_path, names)
    assert first == (20, 30)
    reasons = ["truncated", "0 bytes", "not a file", "not a file", "missing", "null", "too long"]
    for other, reason in zip(others, reasons, strict=True):
        assert isinstance(other, str) and reason in other


def test_sizes_of_many_files_are_kept_until_the_files_change(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "_KEPT_FROM", 2)
    for name in ("a.png", "b.png"):
        save(tmp_path / name, 20, 30)
    names = ["a.png", "b.png", "none.png"]
    first = read_sizes(tmp_path, names)
    assert len(list(cache.rglob("*.json"))) == 1
    monkeypatch.setattr(headers, "_read_hw", lambda path: (1, 1))
    assert read_sizes(tmp_path, names) == first
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert read_sizes(tmp_path, names)[:2] == [(1, 1), (20, 30)]
    for damaged in ("", "[]", "[1]", '{"a.png": 3}', '{"a.png": [null, 1, 2, 3]}'):
        next(cache.rglob("*.json")).write_text(damaged)
        assert read_sizes(tmp_path, names)[:2] == [(1, 1), (1, 1)]
    assert len(json.loads(next(cache.rglob("*.json")).read_text())) == 2


def test_a_cache_that_cannot_be_written_is_not_needed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "_KEPT_FROM", 1)
    save(tmp_path / "a.png", 20, 30)
    cache.write_text("a file in its place")
    assert read_sizes(tmp_path, ["a.png"]) == [(20, 30)]
