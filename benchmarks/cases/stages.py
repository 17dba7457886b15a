"""One image on this machine, stage by stage: CPU and wall milliseconds of each stage.

The images take turns. CPU time is that of the process; with one thread it is the time on an idle
core, and other work on the machine hardly changes it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from benchmarks.harness.report import Report
from benchmarks.harness.rounds import StageClock, take_turns
from benchmarks.inputs import IMAGES, NUCLEI
from benchmarks.ours import LoadedModel, load_model
from pipeline.decode import decode_image
from pipeline.encode import instance_to_coco
from pipeline.postprocess import postprocess
from pipeline.preprocess import prepare
from service.cores import count_cores
from service.engines.base import EngineKind, Precision

STAGES = ("decode", "prepare", "engine", "postprocess", "encode")


def stages(
    *,
    model: Annotated[Path, "folder of the model"] = NUCLEI,
    images: Annotated[Path, "folder of the images"] = IMAGES,
    rounds: Annotated[int, "that count"] = 10,
    threads: Annotated[int, "of an engine call"] = count_cores(),
    engine: Annotated[EngineKind, "that runs the model"] = "ort",
    precision: Annotated[Precision, "of the engine"] = "fp32",
) -> Report:
    loaded = load_model(model, threads, engine=engine, precision=precision, slots=1)
    files = {path.name: path.read_bytes() for path in sorted(images.iterdir())}
    variants = {name: partial(run_stages, loaded, data) for name, data in files.items()}
    samples = take_turns(variants, rounds)
    loaded.backend.close()
    rows = {}
    for name in samples.values:
        median = samples.medians(name)
        cpu_ms = {stage: 1e3 * median[f"{stage}_cpu_s"] for stage in STAGES}
        rows[name] = {
            "tiles": round(median["tiles"]),
            "instances": round(median["instances"]),
            **{f"{stage}_ms": ms for stage, ms in cpu_ms.items()},
            "total_ms": sum(cpu_ms.values()),
            "outside_engine": 1 - cpu_ms["engine"] / sum(cpu_ms.values()),
            "total_wall_ms": 1e3 * sum(median[f"{stage}_wall_s"] for stage in STAGES),
        }
    return Report(
        data={
            "model": f"{loaded.config.name} {loaded.version}",
            "engine": f"{engine} {precision}",
            "clock": "cpu",
            "threads": threads,
            "rows": rows,
        },
        tables={"CPU ms": [{"image": name, **row} for name, row in rows.items()]},
    )


def run_stages(model: LoadedModel, data: bytes) -> dict[str, float]:
    """One image from its bytes to COCO's objects: seconds of each stage, and its size."""
    clock = StageClock()
    image = decode_image(data)
    clock.lap("decode")
    prepared = prepare(image, model.config.input)
    clock.lap("prepare")
    size = model.config.limits.max_batch
    starts = range(0, len(prepared.tiles), size)
    candidates = [c for i in starts for c in model.backend.infer(prepared.tiles[i : i + size])]
    clock.lap("engine")
    found = postprocess(prepared, candidates, model.config.postprocess).instances
    clock.lap("postprocess")
    for instance in found:
        instance_to_coco(instance, model.config)
    clock.lap("encode")
    return {**clock.costs, "tiles": len(prepared.tiles), "instances": len(found)}
