"""Sizes of image files, read from their headers by several threads and kept between runs."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from pipeline.decode import open_image
from pipeline.errors import DecodeError
from service.files import replace_bytes
from training.weights.download import cache_folder

_THREADS = 8
_START_BYTES = 1 << 16
"""Most JPEG files have their size and their orientation in these."""
_KEPT_FROM = 1000
"""Sizes of fewer images are read again each time."""

_Entry = tuple[int, int, int, int]
"""Bytes and time (ns) of the file, height and width of the image."""


def read_sizes(folder: Path, names: Sequence[str]) -> list[tuple[int, int] | str]:
    """Heights and widths, with EXIF orientation, or why a file cannot be read.

    Sizes of files that have not changed are taken from the cache folder, if it can be used.
    """
    kept = _load(folder) if len(names) >= _KEPT_FROM else {}
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = pool.map(lambda name: _read(folder / name, kept.get(name)), names)
        bar = tqdm(entries, "image headers", len(names), disable=None, unit="image", leave=False)
        found = dict(zip(names, bar, strict=True)) if names else {}
    if len(names) >= _KEPT_FROM:
        new = {name: entry for name, entry in found.items() if not isinstance(entry, str)}
        if new != kept:
            _store(folder, new)
    return [e if isinstance(e, str) else (e[2], e[3]) for e in map(found.__getitem__, names)]


def _read(path: Path, kept: _Entry | None) -> _Entry | str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{path} is not a file"
        if kept is not None and kept[:2] == (status.st_size, status.st_mtime_ns):
            return kept
        height, width = _read_hw(path)
    except FileNotFoundError:
        return f"the file {path} is missing"
    except DecodeError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"the file cannot be read: {error}"
    return status.st_size, status.st_mtime_ns, height, width


def _read_hw(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
        if start.startswith(b"\xff\xd8"):
            with suppress(DecodeError):
                return open_image(start).upright_hw
        return open_image(start + file.read()).upright_hw


def _cache_file(folder: Path) -> Path:
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return cache_folder() / "headers" / f"{name}.json"


def _load(folder: Path) -> dict[str, _Entry]:
    try:
        content = json.loads(_cache_file(folder).read_bytes())
        return {
            str(name): (int(a), int(b), int(h), int(w)) for name, (a, b, h, w) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _store(folder: Path, entries: dict[str, _Entry]) -> None:
    path = _cache_file(folder)
    with suppress(OSError, ValueError):
        replace_bytes(path, json.dumps(entries).encode(), shared=True)
