"""A job with many files: what does an interactive client notice, and what does the job lose?

Starts our server and asks for one small image after another: alone, and while a job processes
copies of the validation images. Then the job is alone for the same time.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx

from benchmarks.cases.fairness import ALONE, DURING, ask_small
from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import ratio_of
from benchmarks.harness.server import serve_ours
from benchmarks.inputs import NUCLEI, build_nuclei


def jobs(
    *,
    model: Annotated[Path, "folder of the model"] = NUCLEI,
    files: Annotated[int, "of the job; it must not end before the measurement"] = 10_000,
    seconds: Annotated[float, "of the small client's requests, alone and during"] = 60,
    flags: Annotated[tuple[str, ...], "more flags of the server, without --"] = (),
) -> Report:
    images = list(build_nuclei().images.values())
    more = [f"--{flag}" for flag in flags]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        for number, image in zip(range(files), itertools.cycle(images), strict=False):
            (folder / f"{number:06d}.jpg").write_bytes(image)
        repository = ("--model-repo", f"{model.parent}", "--device", "cpu")
        store = ("--jobs-dir", f"{scratch}/jobs", "--jobs-roots", f"{folder}")
        with serve_ours(Path(scratch) / "log", *repository, *store, *more) as server:
            alone = asyncio.run(ask_small(server.url, model.name, images[0], seconds))
            job = submit(server.url, model.name, folder)
            began = count_done(job), time.monotonic()
            during = asyncio.run(ask_small(server.url, model.name, images[0], seconds))
            middle = count_done(job), time.monotonic()
            time.sleep(seconds)
            ended = count_done(job), time.monotonic()
    if ended[0] >= files:
        raise BenchmarkError(f"the job of {files} files has ended: give it more --files")
    for load in (alone, during):
        load.require_success(server.url)
    loads = {ALONE: alone, DURING: during}
    p50, p99 = (
        {name: 1e3 * load.seconds_at(p, 200) for name, load in loads.items()} for p in (50, 99)
    )
    rates = {
        DURING: (middle[0] - began[0]) / (middle[1] - began[1]),
        ALONE: (ended[0] - middle[0]) / (ended[1] - middle[1]),
    }
    rows: list[Row] = [
        {
            "": name,
            "answers": len(load.answers),
            "p50, ms": p50[name],
            "p99, ms": p99[name],
            "job, files/s": rates[name],
        }
        for name, load in loads.items()
    ]
    ratios = {
        f"{name} during / alone": ratio_of([of[DURING]], [of[ALONE]]).median
        for name, of in (("p50", p50), ("p99", p99))
    }
    notes = [", ".join(f"{name} {value:.2f}" for name, value in ratios.items())]
    return Report(data={"rows": rows, "ratios": ratios}, tables={"": rows}, notes=notes)


def submit(url: str, model: str, folder: Path) -> str:
    """Makes a job of the files of a folder; returns its address."""
    body = {"inputs": [f"{folder.as_uri()}/"], "model": model}
    answer = httpx.post(f"{url}/v2/jobs", json=body, timeout=600).raise_for_status()
    return f"{url}{answer.headers['location']}"


def count_done(job: str) -> int:
    """How many files of a job are finished."""
    content: dict[str, Any] = httpx.get(job, timeout=60).raise_for_status().json()
    return int(content["files"]["done"] + content["files"]["failed"])
