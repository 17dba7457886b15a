"""How long a server's event loop delays others: times of GET /v2/health/live, from outside.

The route does nothing, so its time is a bound on the event loop's lag, with the network and the
operating system's scheduler on top. One connection, one request after another.
"""

from __future__ import annotations

import http.client
import time
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report

PATH = "/v2/health/live"


def ping(
    url: Annotated[str, "of the server"],
    /,
    *,
    seconds: Annotated[float, "length"] = 10,
    pause_ms: Annotated[float, "between requests"] = 5,
) -> Report:
    times_ms = [1e3 * taken_s for taken_s in ask(url, seconds, pause_ms / 1e3)]
    numbers = {f"p{p}_ms": float(np.percentile(times_ms, p)) for p in (50, 95, 99)}
    row = {"count": len(times_ms), **numbers, "max_ms": max(times_ms)}
    return Report(data=row, tables={"": [row]})


def ask(url: str, seconds: float, pause_s: float) -> list[float]:
    """Times of one request after another, s."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    times, end_s = [], time.monotonic() + seconds
    while time.monotonic() < end_s:
        began_s = time.perf_counter()
        connection.request("GET", PATH)
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise BenchmarkError(f"{url}{PATH} answered {response.status}")
        times.append(time.perf_counter() - began_s)
        time.sleep(pause_s)
    connection.close()
    return times
