"""One client with very many canvases in flight: what does another client with small images notice?

Starts our server with limits that admit `--canvases` of one client, which keeps about as many in
flight with blank large PNGs from the source address 127.0.0.2. Another client, 127.0.0.1, sends one
small image after another: first alone, then during that load.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import ratio_of
from benchmarks.harness.server import serve_ours
from benchmarks.inputs import NUCLEI, SMALL_PX, build_nuclei
from benchmarks.load import Load, run_closed_loop
from benchmarks.ours import canvases_of
from tests.support.blob_model import encode_picture

HEAVY, LIGHT = "127.0.0.2", "127.0.0.1"
ALONE, DURING = "alone", "during"
SMALL_CANVASES = 1000
"""More than the small image has with any model."""


def fairness(
    *,
    model: Annotated[Path, "folder of the model, which must be one of tiles"] = NUCLEI,
    canvases: Annotated[int, "in flight of the heavy client"] = 100_000,
    side: Annotated[int, "of the heavy client's square images, px"] = 7000,
    seconds: Annotated[float, "of the small client's requests, alone and during"] = 60,
    settle_s: Annotated[float, "from the heavy client's start to the measurement"] = 10,
    flags: Annotated[tuple[str, ...], "more flags of the server, without --"] = (),
) -> Report:
    of_image = canvases_of(model, (side, side))
    clients = max(1, round(canvases / of_image))
    pixels = max(side * side, SMALL_PX)
    body = encode_picture(np.zeros((side, side, 3), np.uint8))
    small = next(iter(build_nuclei().images.values()))
    limits = {
        "SOLO_MAX_QUEUE_CANVASES": 4 * max(of_image * clients, SMALL_CANVASES),
        "SOLO_MAX_IMAGE_CANVASES": max(of_image, SMALL_CANVASES),
        "SOLO_MAX_IMAGE_PIXELS": pixels,
    }
    environment = {name: str(value) for name, value in limits.items()}
    more = [f"--{flag}" for flag in flags]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        repository = ("--model-repo", f"{model.parent}", "--device", "cpu")
        with serve_ours(log, *repository, *more, environment=environment) as server:
            alone = asyncio.run(ask_small(server.url, model.name, small, seconds))
            heavy, during = asyncio.run(
                ask_both(server.url, model.name, body, clients, small, settle_s, seconds)
            )
            # The heavy client's requests that are still in flight end with the server.
    for load in (alone, during):
        load.require_success(server.url)
    refused = sum(heavy.statuses[status] for status in (413, 422, 429, 503))
    if refused:
        raise BenchmarkError(f"the heavy client was refused: {dict(heavy.statuses)}")
    p50, p99 = (
        {name: 1e3 * load.seconds_at(p, 200) for name, load in ((ALONE, alone), (DURING, during))}
        for p in (50, 99)
    )
    rows: list[Row] = [
        {"": name, "answers": len(load.answers), "p50, ms": p50[name], "p99, ms": p99[name]}
        for name, load in ((ALONE, alone), (DURING, during))
    ]
    ratios = {
        f"{name} during / alone": ratio_of([of[DURING]], [of[ALONE]]).median
        for name, of in (("p50", p50), ("p99", p99))
    }
    data = {
        "canvases_of_an_image": of_image,
        "canvases_in_flight": of_image * clients,
        "heavy_answers": len(heavy.answers),
        "rows": rows,
        "ratios": ratios,
    }
    notes = [
        f"{clients} images of {of_image} canvases in flight, {len(heavy.answers)} answered",
        ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()),
    ]
    return Report(data=data, tables={"": rows}, notes=notes)


async def ask_small(url: str, model: str, body: bytes, seconds: float) -> Load:
    """One small image after another, for a time, and one at least."""
    end_s = time.monotonic() + seconds
    return await run_closed_loop(
        url,
        [body],
        clients=1,
        may_go_on=lambda sent: not sent or time.monotonic() < end_s,
        path=f"/segment?model={model}",
        timeout_s=600,
        address=LIGHT,
    )


async def ask_both(
    url: str,
    model: str,
    large: bytes,
    clients: int,
    small: bytes,
    settle_s: float,
    seconds: float,
) -> tuple[Load, Load]:
    """The heavy client's answers until the small one has ended, and the small one's."""
    heavy = Load()
    running = asyncio.create_task(
        run_closed_loop(
            url,
            [large],
            clients=clients,
            may_go_on=lambda _: True,
            path=f"/segment?model={model}",
            timeout_s=24 * 3600,
            address=HEAVY,
            load=heavy,
        )
    )
    await asyncio.sleep(settle_s)
    found = await ask_small(url, model, small, seconds)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return heavy, found
