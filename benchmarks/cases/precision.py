"""The CPU's engines and precisions beside ONNX Runtime in float32, as they are served.

Each is built from the published files, with early exits where the version has them; all run the
same canvases one by one. OpenVINO is left out where it is not installed or lacks the precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report
from benchmarks.harness.rounds import take_turns, timed
from benchmarks.inputs import IMAGES, NUCLEI
from benchmarks.ours import load_model, read_model
from pipeline.decode import decode_image
from pipeline.model_config import ModelConfig
from pipeline.preprocess import prepare
from pipeline.types import Tile
from service.cores import count_cores
from service.engines.base import Backend
from service.errors import ModelRefused

BASE = "ort:fp32"
VARIANTS = (BASE, "ort:int8", "openvino:fp32", "openvino:bf16")


def precision(
    *,
    model: Annotated[Path, "folder of the model"] = NUCLEI,
    variants: Annotated[tuple[str, ...], "ENGINE:PRECISION"] = VARIANTS,
    images: Annotated[Path, "folder of the images"] = IMAGES,
    canvases: Annotated[int, "of a round"] = 8,
    rounds: Annotated[int, "that count"] = 20,
    threads: Annotated[int, "of an engine call"] = count_cores(),
) -> Report:
    tiles = load_tiles(read_model(model)[0], images, canvases)
    engines: dict[str, Backend] = {}
    notes = []
    for variant in dict.fromkeys((BASE, *variants)):
        engine, _, wanted = variant.partition(":")
        try:
            engines[variant] = load_model(
                model, threads, engine=engine, precision=wanted, slots=1
            ).backend
        except ModelRefused as error:
            notes.append(f"{variant} is left out: {error}")

    def run(backend: Backend) -> None:
        for tile in tiles:
            backend.infer([tile])

    samples = take_turns(
        {n: timed(lambda engine=engine: run(engine)) for n, engine in engines.items()},  # type: ignore[misc]
        rounds,
    )
    rows = [
        {
            "engine and precision": name,
            "CPU ms a canvas": 1e3 * samples.median(name, "cpu_s") / canvases,
            "wall ms a canvas": 1e3 * samples.median(name, "wall_s") / canvases,
            f"CPU time of {BASE}'s (range)": str(samples.ratio(name, BASE, "cpu_s")),
            "wall time (range)": str(samples.ratio(name, BASE, "wall_s")),
        }
        for name in samples.values
    ]
    data = {
        "canvas_hw": list(tiles[0].image.shape[:2]),
        "canvases": canvases,
        "threads": threads,
        "seconds": samples.values,
    }
    return Report(data=data, tables={"": rows}, notes=notes)


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
