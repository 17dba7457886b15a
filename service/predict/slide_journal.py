"""What the journal keeps of slides: rows of tiles, how far they have come, and their survey."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.merge import TileInstance
from pipeline.survey import Survey
from pipeline.types import Detection, Window
from service.jobs.journal import Journal


def name_part(key: str, number: int) -> str:
    """The journal's key of a row of tiles; no file has such a key."""
    return f"{number}//{key}"


def read_all_results(journal: Journal, key: str) -> Iterator[dict[str, Any]]:
    """The results of a file; those of a slide are in parts."""
    yield from journal.read_results(key)
    entry = journal.find(key)
    for number in range(0 if entry is None else entry.get("parts", 0)):
        yield from journal.read_results(name_part(key, number))


@dataclass
class SlideState:
    """How far a slide has come.

    Attributes:
        done: Rows of tiles that are in the journal.
        truncated: Whether max_instances cut the instances of a tile.
        waiting: Instances that may go on in the next row.
    """

    done: int
    truncated: bool
    waiting: list[TileInstance]


def name_state(key: str) -> str:
    """The journal's key of how far a slide has come."""
    return f"state//{key}"


def read_state(key: str, stamp: list[int], journal: Journal) -> SlideState:
    """How far a slide has come; at its start if the file has another stamp."""
    entry = journal.find(name_state(key))
    if entry is None or entry["stamp"] != stamp:
        return SlideState(0, False, [])
    return SlideState(entry["done"], entry["truncated"], [*_read_waiting(entry["waiting"])])


def write_state(state: SlideState) -> dict[str, Any]:
    """The state as JSON."""
    waiting = [
        {
            "label": entry.instance.label,
            "score": entry.instance.score,
            "size": entry.instance.rle["size"],
            "counts": entry.instance.rle["counts"].decode(),
            "bbox": entry.instance.bbox_xywh,
            "area": entry.instance.area,
            "window": _list(entry.window),
            "cut": entry.cut,
            "elsewhere": None if entry.elsewhere is None else _list(entry.elsewhere),
        }
        for entry in state.waiting
    ]
    return {"done": state.done, "truncated": state.truncated, "waiting": waiting}


def _list(window: Window) -> list[int]:
    return [window.y, window.x, window.height, window.width]


def _read_waiting(waiting: Sequence[dict[str, Any]]) -> Iterator[TileInstance]:
    for entry in waiting:
        rle = {"size": entry["size"], "counts": entry["counts"].encode()}
        instance = Detection(
            entry["label"], entry["score"], rle, tuple(entry["bbox"]), entry["area"]
        )
        elsewhere = None if entry["elsewhere"] is None else Window(*entry["elsewhere"])
        yield TileInstance(instance, Window(*entry["window"]), entry["cut"], elsewhere)


def write_survey(made: Survey) -> dict[str, Any]:
    """The survey as JSON."""
    return {
        "limits": made.limits,
        "table": None if made.table is None else made.table.tolist(),
        "shape": made.tissue.shape,
        "tissue": base64.b64encode(np.packbits(made.tissue).tobytes()).decode(),
    }


def read_survey(entry: dict[str, Any]) -> Survey:
    """What `write_survey` gave."""
    limits = None if entry["limits"] is None else (entry["limits"][0], entry["limits"][1])
    table = None if entry["table"] is None else np.array(entry["table"], np.uint8)
    height, width = entry["shape"]
    bits = np.unpackbits(
        np.frombuffer(base64.b64decode(entry["tissue"]), np.uint8), count=height * width
    )
    return Survey(limits, table, bits.reshape(height, width).astype(np.bool_))
