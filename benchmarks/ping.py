"""How long a server's event loop lets others wait: times of GET /v2/health/live, from outside.

python -m benchmarks.ping http://localhost:8000 --seconds 10

The route does nothing, so its time is a bound on the loop's lag (with the network and the
scheduler on top). Asks on one connection, and prints percentiles in ms as JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from urllib.parse import urlsplit

import numpy as np

PATH = "/v2/health/live"


def ping(url: str, seconds: float, pause_s: float) -> list[float]:
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
            raise RuntimeError(f"{url}{PATH} answered {response.status}")
        times.append(time.perf_counter() - began_s)
        time.sleep(pause_s)
    connection.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--pause-ms", type=float, default=5)
    arguments = parser.parse_args()
    times = ping(arguments.url, arguments.seconds, arguments.pause_ms / 1e3)
    numbers = {f"p{p}_ms": round(1e3 * float(np.percentile(times, p)), 2) for p in (50, 95, 99)}
    largest = round(1e3 * max(times), 2)
    json.dump({"count": len(times), **numbers, "max_ms": largest}, sys.stdout)


if __name__ == "__main__":
    main()
