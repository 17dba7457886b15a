"""The engine's time in other precisions beside float32, on the CPU, on the same canvases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report
from benchmarks.harness.rounds import take_turns, timed
from benchmarks.inputs import IMAGES, NUCLEI
from benchmarks.ours import ONNX_FILE, build_engine, read_model
from pipeline.decode import decode_image
from pipeline.model_config import ModelConfig
from pipeline.preprocess import prepare
from pipeline.types import Tile
from service.cores import count_cores

FULL = "fp32"


def precision(
    *,
    model: Annotated[Path, "folder of the model"] = NUCLEI,
    version: Annotated[int | None, "of the model"] = None,
    precisions: Annotated[tuple[str, ...], "files model.PRECISION.onnx"] = ("int8",),
    images: Annotated[Path, "folder of the images"] = IMAGES,
    batch: Annotated[int, "canvases in a call"] = 4,
    rounds: Annotated[int, "that count"] = 20,
    threads: Annotated[int, "of an engine call"] = count_cores(),
) -> Report:
    config, folder = read_model(model, version)
    files = {FULL: ONNX_FILE, **{name: f"model.{name}.onnx" for name in precisions}}
    engines = {
        name: build_engine((folder / file).read_bytes(), threads) for name, file in files.items()
    }
    tiles = load_tiles(config, images, batch)
    samples = take_turns(
        {n: timed(lambda engine=engine: engine.infer(tiles)) for n, engine in engines.items()},  # type: ignore[misc]
        rounds,
    )
    rows = [
        {
            "precision": name,
            "CPU ms a canvas": 1e3 * samples.median(name, "cpu_s") / batch,
            "wall ms a canvas": 1e3 * samples.median(name, "wall_s") / batch,
            "CPU time of fp32's (range)": str(samples.ratio(name, FULL, "cpu_s")),
        }
        for name in samples.values
    ]
    data = {
        "canvas_hw": list(tiles[0].image.shape[:2]),
        "batch": batch,
        "threads": threads,
        "seconds": samples.values,
    }
    return Report(data=data, tables={"": rows})


def load_tiles(config: ModelConfig, folder: Path, count: int) -> list[Tile]:
    """The first canvases of one shape, image by image.

    Raises:
        BenchmarkError: There are too few.
    """
    tiles: list[Tile] = []
    for path in sorted(folder.iterdir()):
        found = prepare(decode_image(path.read_bytes()), config.input).tiles
        tiles += [t for t in found if not tiles or t.image.shape == tiles[0].image.shape]
        if len(tiles) >= count:
            return tiles[:count]
    raise BenchmarkError(f"{folder} has {len(tiles)} canvases of one shape, {count} are needed")
