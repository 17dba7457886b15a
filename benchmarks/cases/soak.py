"""Very many requests at a rate the server can hold: does memory grow, and is every one counted?

    solo-serve --model-repo model_repo &
    python -m benchmarks soak http://localhost:8000 --requests 100000 --rate 50

Requests are sent at random times with a mean rate. The server's resident memory is read from its
/metrics; the slope is that of a least-squares line through all samples after the first fifth. At
the end the server's counters must equal what was sent, so nobody else may use it meanwhile. Fails
if a request got no answer or a 5xx other than 503, or if a counter differs.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.harness.report import Report
from benchmarks.load import NO_ANSWER, Load, read_metrics, run_at_rate
from tests.support.blob_model import draw_picture, encode_picture

RESIDENT = "process_resident_memory_bytes"
EXPECTED = (200, 503)
Sample = tuple[float, float]
"""Seconds since the start, and resident bytes."""


def soak(
    url: Annotated[str, "of the server"],
    /,
    *,
    images: Annotated[tuple[Path, ...], "files to send in turn; none: a small drawn PNG"] = (),
    requests: Annotated[int, "in all"] = 100_000,
    rate: Annotated[float, "mean requests a second"] = 50,
    interval_s: Annotated[float, "between samples of the memory"] = 2,
) -> Report:
    picture = draw_picture(48, 64, {"red": (8, 10, 22, 24), "blue": (36, 20, 24, 24)})
    bodies = [file.read_bytes() for file in images] or [encode_picture(picture)]
    before = count_served(read_metrics(url))
    began_s = time.monotonic()
    load, samples = asyncio.run(run(url, bodies, requests, rate, interval_s))
    taken_s = time.monotonic() - began_s
    metrics = read_metrics(url)
    slope = measure_slope(samples)
    differences = compare(load.statuses, before, count_served(metrics))
    seconds = [answer.seconds for answer in load.answers]
    numbers: dict[str, Any] = {
        "requests": requests,
        "seconds": round(taken_s, 1),
        "per_second": round(requests / taken_s, 1),
        "statuses": {str(status): n for status, n in sorted(load.statuses.items())},
        **{f"p{p}_ms": round(1e3 * float(np.percentile(seconds, p)), 1) for p in (50, 95, 99)},
        "rss_samples": len(samples),
        "rss_mb_after_a_fifth": round(samples[len(samples) // 5][1] / 1e6, 1),
        "rss_mb_at_the_end": round(metrics[RESIDENT] / 1e6, 1),
        "rss_slope_kb_per_minute": round(slope * 60 / 1e3, 2),
        "rss_slope_bytes_per_request": round(slope * taken_s / requests, 2),
        "differences": differences,
    }
    failed = [f"{n} answers {s}" for s, n in load.statuses.items() if s not in EXPECTED]
    rows = [{"number": name, "value": str(value)} for name, value in numbers.items()]
    return Report(data=numbers, tables={"": rows}, failures=[*failed, *differences])


async def run(
    url: str, bodies: list[bytes], count: int, per_second: float, interval_s: float
) -> tuple[Load, list[Sample]]:
    """Sends everything, and samples the memory meanwhile."""
    samples: list[Sample] = []
    began_s = time.monotonic()

    async def watch() -> None:
        while True:
            metrics = await asyncio.to_thread(read_metrics, url)
            samples.append((time.monotonic() - began_s, metrics[RESIDENT]))
            await asyncio.sleep(interval_s)

    watching = asyncio.create_task(watch())
    load = await run_at_rate(url, bodies, per_second=per_second, count=count)
    watching.cancel()
    return load, samples


def count_served(metrics: dict[str, float]) -> dict[str, float]:
    """The server's counters: requests by status, images, and both histograms."""
    counted: dict[str, float] = defaultdict(float)
    for name, value in metrics.items():
        if name.startswith("solo_requests_total{") and 'route="/segment"' in name:
            counted["status " + name.partition('status="')[2].partition('"')[0]] += value
        elif name.startswith("solo_images_total{"):
            counted["images"] += value
        elif name.startswith("solo_stage_duration_seconds_count{") and 'stage="total"' in name:
            counted["images in the histogram"] += value
        elif name.startswith("solo_request_duration_seconds_count{") and '"/segment"' in name:
            counted["requests in the histogram"] += value
    return dict(counted)


def compare(sent: Counter[int], before: dict[str, float], after: dict[str, float]) -> list[str]:
    """One line for each counter that differs from what was sent."""
    wanted = {f"status {status}": n for status, n in sent.items() if status != NO_ANSWER}
    wanted |= {"images": sent[200], "images in the histogram": sent[200]}
    wanted["requests in the histogram"] = sent.total() - sent[NO_ANSWER]
    grown = {name: after[name] - before.get(name, 0) for name in after}
    return [
        f"{name}: {grown.get(name, 0):g} counted, {wanted.get(name, 0)} sent"
        for name in sorted({*wanted, *grown})
        if grown.get(name, 0) != wanted.get(name, 0)
    ]


def measure_slope(samples: list[Sample]) -> float:
    """Bytes a second, after the first fifth."""
    times, sizes = np.array(samples[len(samples) // 5 :]).T
    return float(np.polyfit(times, sizes, 1)[0])
