"""A soak: very many requests at a rate the machine holds; does memory grow, and is all counted?

solo-serve --model-repo model_repo &
python -m benchmarks.soak http://localhost:8000 --requests 100000 --rate 50 --out soak.json

Sends the images named (default: a small PNG of its own) at random moments with a mean rate. The
server's resident memory is read from its /metrics every few seconds; the slope is that of a
least-squares line through all samples behind the first fifth. At the end the server's counters are
compared with what was sent, exactly; so nobody else may ask it meanwhile. Exits 1 if a request got
no answer or an answer of the server's own failing, or if a counter differs.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.load import NO_ANSWER, ask, open_client, read_metrics
from benchmarks.report import this_command, write_report

RESIDENT = "process_resident_memory_bytes"
EXPECTED = (200, 503)
Sample = tuple[float, float]
"""Seconds since the start, and resident bytes."""


def build_picture() -> bytes:
    """A small image with something in it."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[10:34, 8:30, 0] = 255
    pixels[20:44, 36:60, 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


async def watch_memory(url: str, began_s: float, interval_s: float, samples: list[Sample]) -> None:
    """Adds a sample every interval; never returns."""
    while True:
        metrics = await asyncio.to_thread(read_metrics, url)
        samples.append((time.monotonic() - began_s, metrics[RESIDENT]))
        await asyncio.sleep(interval_s)


async def soak(
    url: str, bodies: list[bytes], count: int, per_second: float, interval_s: float
) -> tuple[Counter[int], list[float], list[Sample]]:
    """Sends everything; statuses, seconds of the answers, and the memory's samples.

    Keeps no request longer than it takes, unlike `load.run_at_rate`.
    """
    rng = np.random.default_rng(0)
    statuses: Counter[int] = Counter()
    seconds: list[float] = []
    samples: list[Sample] = []
    async with open_client(url) as client:

        async def send(index: int) -> None:
            answer = await ask(client, "/segment", bodies[index % len(bodies)])
            statuses[answer.status] += 1
            seconds.append(answer.seconds)

        began_s = due_s = time.monotonic()
        watching = asyncio.create_task(watch_memory(url, began_s, interval_s, samples))
        async with asyncio.TaskGroup() as tasks:
            for index in range(count):
                due_s += float(rng.exponential(1 / per_second))
                await asyncio.sleep(due_s - time.monotonic())
                tasks.create_task(send(index))
        watching.cancel()
    return statuses, seconds, samples


def count_served(metrics: dict[str, float]) -> dict[str, float]:
    """What the server has counted: requests by status, images, and both histograms."""
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
    """Bytes a second, behind the first fifth."""
    times, sizes = np.array(samples[len(samples) // 5 :]).T
    return float(np.polyfit(times, sizes, 1)[0])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The soak's numbers."""
    bodies = [file.read_bytes() for file in arguments.images] or [build_picture()]
    before = count_served(read_metrics(arguments.url))
    began_s = time.monotonic()
    statuses, seconds, samples = asyncio.run(
        soak(arguments.url, bodies, arguments.requests, arguments.rate, arguments.interval_s)
    )
    taken_s = time.monotonic() - began_s
    metrics = read_metrics(arguments.url)
    slope = measure_slope(samples)
    first_mb = samples[len(samples) // 5][1] / 1e6
    return {
        "requests": arguments.requests,
        "seconds": round(taken_s, 1),
        "per_second": round(arguments.requests / taken_s, 1),
        "statuses": {str(status): n for status, n in sorted(statuses.items())},
        **{f"p{p}_ms": round(1e3 * float(np.percentile(seconds, p)), 1) for p in (50, 95, 99)},
        "rss_samples": len(samples),
        "rss_mb_after_a_fifth": round(first_mb, 1),
        "rss_mb_at_the_end": round(metrics[RESIDENT] / 1e6, 1),
        "rss_slope_kb_per_minute": round(slope * 60 / 1e3, 2),
        "rss_slope_bytes_per_request": round(slope * taken_s / arguments.requests, 2),
        "differences": compare(statuses, before, count_served(metrics)),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("images", nargs="*", type=Path, help="files to send in turn")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=50, help="mean requests a second")
    parser.add_argument("--interval-s", type=float, default=2, help="between memory samples, s")
    parser.add_argument("--out", type=Path, help="write the numbers, with the command")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    numbers = run(arguments)
    text = json.dumps(numbers, indent=2)
    print(text)
    if arguments.out is not None:
        write_report(arguments.out, this_command("benchmarks.soak"), numbers)
    failed = [status for status in numbers["statuses"] if int(status) not in EXPECTED]
    if failed or numbers["differences"]:
        sys.exit("the soak failed: " + "; ".join([*failed, *numbers["differences"]]))


if __name__ == "__main__":
    main()
