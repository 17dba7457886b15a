"""Five times what the server can do, for as long as one likes; busy neighbours can be added.

python -m tests.reliability.overload --seconds 1800
python -m tests.reliability.overload --seconds 30 --busy 14
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness.memory import reset_peak
from benchmarks.load import Load, run_at_rate, run_closed_loop
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.memory import read_peak_bytes, read_resident_bytes
from tests.support.server import CPU_FLAGS, run_server
from tests.support.slow_model import ONE_CANVAS, build_slow_graph, publish_graph

PICTURE = encode_picture(draw_picture())
LIMITS = ("--max-batch", "2", "--max-queue-canvases", "32")
"""A client alone may have half of the canvases in flight."""
TIMES = 5


@dataclass(frozen=True)
class Overload:
    """What came of it.

    Attributes:
        capacity_per_s: Requests a second of eight clients in a closed loop, before.
        offered: Requests of the overload.
        statuses: How often each came; "0" is a request without an answer.
        retry_after: All values that this header had with a 503.
        rejection_p50_ms: From a request to its 503, the client's own delays included.
        rejection_p99_ms: The same.
        accepted_p99_ms: From a request to its 200.
        rss_growth_percent: Resident memory after it, over that before it.
        rss_peak_growth_percent: The most resident memory in it, over that before it.
    """

    capacity_per_s: float
    offered: int
    statuses: dict[str, int]
    retry_after: list[str | None]
    rejection_p50_ms: float
    rejection_p99_ms: float
    accepted_p99_ms: float
    rss_growth_percent: float
    rss_peak_growth_percent: float


@contextmanager
def run_neighbours(count: int) -> Iterator[None]:
    """Programs that take all the processor they get."""
    neighbours = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)
    ]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def measure_overload(folder: Path, seconds: float, busy: int = 0) -> Overload:
    """Offers a server of its own five times its capacity, after as much as fills every buffer.

    Args:
        folder: For the model and the server's log.
        seconds: How long.
        busy: Neighbours that compute meanwhile.
    """
    publish_graph(folder / "repo", "blobs", build_slow_graph(rounds=6000), input=ONE_CANVAS)
    flags = ("--model-repo", str(folder / "repo"), *CPU_FLAGS, *LIMITS)
    with run_server(folder / "log", *flags) as server:
        pid = server.process.pid
        end_s = time.monotonic() + 2
        full = asyncio.run(
            run_closed_loop(
                server.url, [PICTURE], clients=8, may_go_on=lambda _: time.monotonic() < end_s
            )
        )
        capacity = len(full.answers) / 2
        rate = TIMES * capacity
        asyncio.run(run_at_rate(server.url, [PICTURE], per_second=rate, count=round(rate)))
        before = read_resident_bytes(pid)
        reset_peak(pid)
        count = round(seconds * rate)
        with run_neighbours(busy):
            load = asyncio.run(run_at_rate(server.url, [PICTURE], per_second=rate, count=count))
        after, peak = read_resident_bytes(pid), read_peak_bytes(pid)
    return _summarise(load, capacity, count, 100 * (after / before - 1), 100 * (peak / before - 1))


def _summarise(
    load: Load, capacity: float, offered: int, growth: float, peak_growth: float
) -> Overload:
    return Overload(
        capacity_per_s=capacity,
        offered=offered,
        statuses={str(status): count for status, count in sorted(load.statuses.items())},
        retry_after=sorted(
            {answer.retry_after for answer in load.answers if answer.status == 503}, key=str
        ),
        rejection_p50_ms=1e3 * load.seconds_at(50, 503),
        rejection_p99_ms=1e3 * load.seconds_at(99, 503),
        accepted_p99_ms=1e3 * load.seconds_at(99, 200),
        rss_growth_percent=growth,
        rss_peak_growth_percent=peak_growth,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--busy", type=int, default=0, help="neighbours that compute meanwhile")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_overload(Path(folder), arguments.seconds, arguments.busy)
    json.dump(asdict(found), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
