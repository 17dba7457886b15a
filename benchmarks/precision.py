"""python -m benchmarks.precision: the engine's time in other precisions beside float32, on the CPU.

The graphs of one version take turns on the same canvases, so that whatever else the machine does
falls on all of them; what is compared is the ratio within a turn. CPU time is reported beside the
time on the wall: the former does not count the waiting for a core that other work holds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.report import ratio_quartiles, this_command, write_report
from pipeline.decode import decode_image
from pipeline.model_config import ModelConfig
from pipeline.preprocess import prepare
from pipeline.types import Tile
from service.cores import count_cores
from service.engines.base import BackendOptions
from service.engines.onnxruntime import build_ort_backend
from service.engines.slots import SlotBackend
from service.models.repository import ONNX_FILE, read_config

FULL = "fp32"


def load_tiles(config: ModelConfig, folder: Path, count: int) -> list[Tile]:
    """The first canvases of one shape, image by image."""
    tiles: list[Tile] = []
    for path in sorted(folder.iterdir()):
        found = prepare(decode_image(path.read_bytes()), config.input).tiles
        tiles += [t for t in found if not tiles or t.image.shape == tiles[0].image.shape]
        if len(tiles) >= count:
            return tiles[:count]
    raise ValueError(f"{folder} gives {len(tiles)} canvases of one shape, {count} are needed")


def take_turns(
    backends: dict[str, SlotBackend], tiles: list[Tile], turns: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds for each canvas, CPU and wall, of every turn; the first turn warms up."""
    laps: dict[str, dict[str, list[float]]] = {n: {"cpu": [], "wall": []} for n in backends}
    for turn in range(turns + 1):
        for name, backend in backends.items():
            cpu, wall = time.process_time(), time.perf_counter()
            backend.infer(tiles)
            spent = time.process_time() - cpu, time.perf_counter() - wall
            if turn:
                for clock, seconds in zip(("cpu", "wall"), spent, strict=True):
                    laps[name][clock].append(1e3 * seconds / len(tiles))
    return laps


def summarise(laps: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Medians, and the median and quartiles of the ratio to float32 within a turn."""
    rows = {}
    for name, clocks in laps.items():
        row = {f"{clock}_ms": float(np.median(values)) for clock, values in clocks.items()}
        rows[name] = row | ratio_quartiles(clocks["cpu"], laps[FULL]["cpu"])
    return rows


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("model_repo/nuclei"))
    parser.add_argument("--version", type=int)
    parser.add_argument("--precision", nargs="+", default=["int8"])
    parser.add_argument("--images", type=Path, default=Path("tests/data/nuclei/images"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = read_config(options.model, options.version)
    folder = options.model / str(config.version)
    files = {FULL: ONNX_FILE, **{p: f"model.{p}.onnx" for p in options.precision}}
    engine = BackendOptions(device="cpu", threads=options.threads)
    backends = {p: build_ort_backend((folder / f).read_bytes(), engine) for p, f in files.items()}
    tiles = load_tiles(config, options.images, options.batch)
    rows = summarise(take_turns(backends, tiles, options.turns))
    for name, row in rows.items():
        print(
            f"{name:>5} {row['cpu_ms']:8.1f} ms CPU {row['wall_ms']:8.1f} ms wall a canvas, "
            f"{row['ratio']:.2f} of fp32 (quartiles {row['ratio_q1']:.2f}, {row['ratio_q3']:.2f})"
        )
    if options.json:
        content: dict[str, Any] = {
            "canvas_hw": list(tiles[0].image.shape[:2]),
            "batch": options.batch,
            "threads": options.threads,
            "turns": options.turns,
            "onnxruntime": ort.__version__,
            "rows": rows,
        }
        write_report(options.json, this_command("benchmarks.precision"), content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
