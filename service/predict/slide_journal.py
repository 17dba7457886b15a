"""What the journal keeps of slides: rows of tiles, how far they have come, and their survey."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.merge import Ranked, TileInstance
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
    yield from read_parts(journal, key, 0 if entry is None else entry.get("parts", 0))


def read_parts(journal: Journal, key: str, parts: int) -> Iterator[dict[str, Any]]:
    """The results of the first rows of tiles of a slide."""
    for number in range(parts):
        yield from journal.read_results(name_part(key, number))


@dataclass
class SlideState:
    """How far a slide has come.

    Attributes:
        done: Rows of tiles that are in the journal.
        truncated: Whether max_instances cut the instances of a tile.
        waiting: Instances that may go on in the next row.
        merged: Instances whose overlaps are not resolved yet.
    """

    done: int
    truncated: bool
    waiting: list[TileInstance]
    merged: list[Ranked]


def name_state(key: str) -> str:
    """The journal's key of how far a slide has come."""
    return f"state//{key}"


def read_state(key: str, stamp: list[int], journal: Journal) -> SlideState:
    """How far a slide has come; at its start if the file has another stamp."""
    entry = journal.find(name_state(key))
    if entry is None or entry["stamp"] != stamp:
        return SlideState(0, False, [], [])
    waiting = [*_read_waiting(entry["waiting"])]
    merged = [
        Ranked((*item["rank"],), _read_instance(item["instance"]))
        for item in entry.get("merged", ())
    ]
    return SlideState(entry["done"], entry["truncated"], waiting, merged)


def write_state(state: SlideState) -> dict[str, Any]:
    """The state as JSON."""
    waiting = [
        {
            **_write_instance(entry.instance),
            "window": _list(entry.window),
            "cut": entry.cut,
            "elsewhere": None if entry.elsewhere is None else _list(entry.elsewhere),
            "number": entry.number,
        }
        for entry in state.waiting
    ]
    merged = [{"rank": e.rank, "instance": _write_instance(e.instance)} for e in state.merged]
    return {
        "done": state.done,
        "truncated": state.truncated,
        "waiting": waiting,
        "merged": merged,
    }


def _write_instance(instance: Detection) -> dict[str, Any]:
    return {
        "label": instance.label,
        "score": instance.score,
        "size": instance.rle["size"],
        "counts": instance.rle["counts"].decode(),
        "bbox": instance.bbox_xywh,
        "area": instance.area,
    }


def _read_instance(entry: dict[str, Any]) -> Detection:
    rle = {"size": entry["size"], "counts": entry["counts"].encode()}
    return Detection(entry["label"], entry["score"], rle, tuple(entry["bbox"]), entry["area"])


def _list(window: Window) -> list[int]:
    return [window.y, window.x, window.height, window.width]


def _read_waiting(waiting: Sequence[dict[str, Any]]) -> Iterator[TileInstance]:
    for entry in waiting:
        yield TileInstance(
            _read_instance(entry),
            Window(*entry["window"]),
            entry["cut"],
            None if entry["elsewhere"] is None else Window(*entry["elsewhere"]),
            entry.get("number", 0),
        )


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
