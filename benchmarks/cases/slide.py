"""A generated slide through solo-predict: time for each gigapixel, and memory over the run.

The slide is a tiled BigTIFF: a dark ground with noise, and round patches full of bright discs, the
tissue. solo-predict is a process of its own, whose resident set is read every half second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import tifffile

from benchmarks.harness import BenchmarkError
from benchmarks.harness.memory import read_status
from benchmarks.harness.report import ROOT, Report, Row
from benchmarks.inputs import NUCLEI
from pipeline.types import UInt8

TILE_PX = 512
PITCH_PX = 24
"""From one disc to the next."""
PATCH_TILES = 4
"""Side of a patch of tissue, in tiles."""
SAMPLE_S = 0.5


def slide(
    *,
    model: Annotated[Path, "folder of a model with tiles"] = NUCLEI,
    side: Annotated[int, "of the slide, px"] = 40_000,
    tissue: Annotated[float, "share of the slide"] = 0.02,
    threads: Annotated[int, "of solo-predict"] = 1,
    folder: Annotated[Path | None, "for the slide and its result (default: temporary)"] = None,
) -> Report:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "slide.tif"
        tissue_px = write_slide(path, side, tissue)
        row = predict(path, model, threads)
    pixels = side * side
    row |= {
        "slide, gigapixels": pixels / 1e9,
        "tissue, megapixels": tissue_px / 1e6,
        "s per gigapixel": row["wall s"] / pixels * 1e9,
        "CPU s per megapixel of tissue": row["CPU s"] / tissue_px * 1e6,
    }
    memory = row.pop("memory")
    curve = [
        {"part of the time": f"{tenth * 10}%", "resident set, MB": mean / 1e6}
        for tenth, mean in enumerate(average_tenths(memory))
    ]
    return Report(
        data={"row": row, "memory_bytes": memory, "sample_s": SAMPLE_S},
        tables={"": [row], "mean resident set in each tenth of the time": curve},
        packages=("tifffile",),
    )


def write_slide(path: Path, side: int, tissue: float) -> int:
    """Writes the slide; returns the pixels of its tissue.

    Raises:
        BenchmarkError: It is smaller than a patch, or the share is not within 0..1.
    """
    tiles = -(-side // TILE_PX)
    if not 0 < tissue <= 1 or tiles < PATCH_TILES:
        raise BenchmarkError(
            f"side {side} is below {PATCH_TILES * TILE_PX}, or tissue {tissue} not in 0..1"
        )
    rng = np.random.default_rng(0)
    ground = rng.integers(8, 13, (TILE_PX, TILE_PX), dtype=np.uint8)
    full = draw_discs(ground, rng)
    patches = tiles // PATCH_TILES
    count = max(1, round(tissue * side**2 / (PATCH_TILES * TILE_PX) ** 2))
    chosen = {int(p) for p in rng.permutation(patches**2)[:count]}

    def make_tiles() -> Iterator[UInt8]:
        for row in range(tiles):
            for column in range(tiles):
                place = row // PATCH_TILES * patches + column // PATCH_TILES
                inside = max(row, column) < patches * PATCH_TILES
                yield full if inside and place in chosen else ground

    tifffile.imwrite(
        path,
        make_tiles(),
        shape=(side, side),
        dtype=np.uint8,
        tile=(TILE_PX, TILE_PX),
        bigtiff=True,
        photometric="minisblack",
        compression="zlib",
        compressionargs={"level": 1},
    )
    return len(chosen) * (PATCH_TILES * TILE_PX) ** 2


def draw_discs(ground: UInt8, rng: np.random.Generator) -> UInt8:
    """A tile of discs of 8 to 16 px, none of which crosses its border."""
    tile = ground.copy()
    for y in range(PITCH_PX // 2, TILE_PX - PITCH_PX // 2, PITCH_PX):
        for x in range(PITCH_PX // 2, TILE_PX - PITCH_PX // 2, PITCH_PX):
            cv2.circle(tile, (x, y), int(rng.integers(4, 9)), int(rng.integers(90, 200)), -1)
    return cv2.GaussianBlur(tile, (3, 3), 0).astype(np.uint8)


def predict(path: Path, model: Path, threads: int) -> Row:
    """Runs solo-predict; its time, memory and instances.

    Raises:
        BenchmarkError: It fails.
    """
    out = path.with_suffix(".json")
    command = [sys.executable, "-m", "service.predict", str(path)]
    log = path.with_suffix(".log")
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *command,
                "--model-repo",
                str(model.resolve()),
                "--out",
                str(out),
                "--threads",
                str(threads),
            ],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    memory = []
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        with suppress(OSError, RuntimeError):  # it has just ended
            memory.append(read_status("VmRSS", process.pid))
        time.sleep(SAMPLE_S)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        text = log.read_text(errors="replace").strip()
        raise BenchmarkError(f"solo-predict ended with {process.returncode}: {text[-300:]}")
    return {
        "wall s": time.perf_counter() - started,
        "CPU s": usage.ru_utime + usage.ru_stime,
        "peak memory, MB": usage.ru_maxrss * 1024 / 1e6,
        "instances": len(json.loads(out.read_text())),
        "memory": memory,
    }


def average_tenths(values: list[int]) -> list[float]:
    """Means of ten equal parts, fewer if there are fewer values."""
    return [float(np.mean(part)) for part in np.array_split(values, 10) if len(part)]
