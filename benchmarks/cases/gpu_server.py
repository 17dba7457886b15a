"""The real server on a network of the paper: a closed loop of clients, one image size, then a mix.

Each client has one request in flight. NOT RUN ON HARDWARE. Weights are random and candidates
forced, as in `benchmarks gpu`. `--device cpu` with a tiny network checks that all of it works.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

from benchmarks.gpu.engines import Device, EngineRecipe, publish_subject
from benchmarks.gpu.subjects import PAPER_FPS, build_subject
from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report, Row
from benchmarks.harness.server import Server, measure_load, serve_ours
from benchmarks.inputs import build_jpeg, read_images
from benchmarks.load import read_metrics
from service.engines.aoti_package import PackagePrecision

Pictures = Literal["one size", "mix"]
MIX_HW = (
    *((480, 640),) * 6,
    *((640, 480),) * 3,
    *((427, 640),) * 4,
    *((640, 427),) * 2,
    *((375, 500), (500, 375), (426, 640), (640, 426), (612, 612), (360, 640), (640, 640)),
)
"""Frequent sizes of photographs in COCO."""


def gpu_server(
    *,
    model: Annotated[str, "network"] = "solo_512_r50",
    device: Annotated[Device, "where"] = "cuda",
    precision: Annotated[PackagePrecision, "of the package"] = "bf16",
    packages: Annotated[Path | None, "folder where compiled packages are kept"] = None,
    clients: Annotated[tuple[int, ...], "of a closed loop"] = (16, 64, 128),
    batch: Annotated[int, "most canvases in a call"] = 16,
    pictures: Annotated[Path | None, "folder of JPEGs for the mix (default: generated)"] = None,
    engine: Annotated[Literal["aoti", "ort"], "of the server"] = "aoti",
    seconds: Annotated[float, "of each load"] = 8,
) -> Report:
    if min(clients) < 1:
        raise BenchmarkError("--clients must be at least 1")
    subject = build_subject(model, batch)
    recipe = EngineRecipe(device=device, precision=precision, packages=packages)
    mix = read_images(pictures) if pictures else [build_jpeg(*image_hw) for image_hw in MIX_HW]
    bodies: dict[Pictures, list[bytes]] = {"one size": [subject.jpeg], "mix": mix}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        root, log = Path(scratch) / "repo", Path(scratch) / "log"
        publish_subject(subject, root, recipe if engine == "aoti" else None)
        flags = ["--model-repo", root, "--device", device, "--engine", engine]
        flags += ["--precision", precision, "--max-batch", batch, "--max-connections", 4096]
        with serve_ours(log, *map(str, flags)) as server:
            for name, files in bodies.items():
                measure_load(server, files, requests=2 * max(clients), clients=max(clients))
                rows += [
                    {"model": model, "pictures": name, **measure(server, files, count, seconds)}
                    for count in clients
                ]
        print(log.read_text(errors="replace")[-3000:])
    failed = [row for row in rows if row["errors"]]
    return Report(
        data={"engine": engine, "paper_v100_fps": PAPER_FPS.get(model), "rows": rows},
        tables={"": rows},
        packages=("torch", "cuda-core"),
        failures=[f"{row['errors']} errors with {row['clients']} clients" for row in failed],
    )


def measure(server: Server, bodies: list[bytes], clients: int, seconds: float) -> Row:
    """One load, with the mean batch of the engine's calls."""
    before = read_metrics(server.url)
    costs = measure_load(server, bodies, seconds=seconds, clients=clients)
    after = read_metrics(server.url)

    def added(name: str) -> float:
        return sum(v - before.get(k, 0) for k, v in after.items() if k.startswith(name))

    calls = added("solo_batch_size_count")
    return {
        "clients": clients,
        "images_per_s": round(costs["images_per_s"], 1),
        "p50_ms": round(costs["p50_ms"], 1),
        "p99_ms": round(costs["p99_ms"], 1),
        "mean_batch": round(added("solo_batch_size_sum") / calls, 2) if calls else 0.0,
        "server_cores": round(costs["server_cores"], 2),
        "client_cores": round(costs["client_cores"], 2),
        "errors": int(costs["errors"]),
    }
