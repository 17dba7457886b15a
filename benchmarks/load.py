"""Loads on a running server from one event loop: a closed loop of clients, or an open loop.

In a closed loop each client sends its next request when it has its answer. In an open loop requests
are sent at a rate, whatever the server does, like those of many independent clients.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import httpx
import numpy as np

_HEADERS = {"content-type": "application/octet-stream"}
NO_ANSWER = 0
"""Status of a request that ended without an answer."""


@dataclass(frozen=True)
class Answer:
    """The result of one request.

    Attributes:
        status: Of HTTP, or `NO_ANSWER`.
        seconds: From the request to the whole answer.
        sent_s: When it was sent, on the monotonic clock.
        retry_after: The header, if there is one.
        error: The exception's text if there was no answer.
    """

    status: int
    seconds: float
    sent_s: float
    retry_after: str | None = None
    error: str = ""


@dataclass
class Load:
    """The answers of a load, in the order of their arrival."""

    answers: list[Answer] = field(default_factory=list)

    @property
    def statuses(self) -> Counter[int]:
        """How often each status came."""
        return Counter(answer.status for answer in self.answers)

    def seconds_at(self, percentile: float, status: int) -> float:
        """A percentile of the times of the answers with a status; NaN if there are none."""
        seconds = [answer.seconds for answer in self.answers if answer.status == status]
        return float(np.percentile(seconds, percentile)) if seconds else float("nan")

    def require_success(self, url: str) -> None:
        """Makes sure that there are answers and that each is 200.

        Raises:
            RuntimeError: One is not; names the server at `url`.
        """
        if set(self.statuses) != {200}:
            raise RuntimeError(f"{url} answered {dict(self.statuses)}")


async def ask(client: aiohttp.ClientSession, path: str, body: bytes) -> Answer:
    """One request."""
    sent_s = time.monotonic()
    try:
        async with client.post(path, data=body, headers=_HEADERS) as response:
            await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        return Answer(NO_ANSWER, time.monotonic() - sent_s, sent_s, error=repr(error))
    retry_after = response.headers.get("retry-after")
    return Answer(response.status, time.monotonic() - sent_s, sent_s, retry_after)


def open_client(
    url: str, *, timeout_s: float = 120, address: str | None = None
) -> aiohttp.ClientSession:
    """A client with as many connections as a load needs.

    Args:
        url: The server.
        timeout_s: For a whole request.
        address: Source address of its connections, such as 127.0.0.2.
    """
    connector = aiohttp.TCPConnector(limit=0, local_addr=(address, 0) if address else None)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout)


async def run_closed_loop(
    url: str,
    bodies: Sequence[bytes],
    *,
    clients: int,
    may_go_on: Callable[[int], bool],
    path: str = "/segment",
    timeout_s: float = 120,
    address: str | None = None,
    load: Load | None = None,
) -> Load:
    """Clients that each wait for their answer.

    Args:
        url: The server.
        bodies: Images; client i begins with the i-th and goes on from there.
        clients: Requests in flight.
        may_go_on: Gets the number of requests sent; no more are sent once it returns False.
        path: With its query.
        timeout_s: For one request.
        address: Source address of the connections.
        load: Gets the answers as they arrive; None for a new one.
    """
    load, sent = Load() if load is None else load, itertools.count()

    async def run_client(client: aiohttp.ClientSession, first: int) -> None:
        for turn in itertools.count(first):
            if not may_go_on(next(sent)):
                return
            load.answers.append(await ask(client, path, bodies[turn % len(bodies)]))

    async with open_client(url, timeout_s=timeout_s, address=address) as client:
        await asyncio.gather(*(run_client(client, index) for index in range(clients)))
    return load


async def run_at_rate(
    url: str,
    bodies: Sequence[bytes],
    *,
    per_second: float,
    count: int,
    path: str = "/segment",
    seed: int = 0,
) -> Load:
    """Requests at random times (a Poisson process).

    Args:
        url: The server.
        bodies: Images, in turn.
        per_second: Mean rate.
        count: Requests.
        path: With its query.
        seed: Of the times.
    """
    load = Load()
    due_s = np.cumsum(np.random.default_rng(seed).exponential(1 / per_second, count))

    async def send(client: aiohttp.ClientSession, index: int) -> None:
        load.answers.append(await ask(client, path, bodies[index % len(bodies)]))

    async with open_client(url) as client, asyncio.TaskGroup() as tasks:
        began_s = time.monotonic()
        for index in range(count):
            await asyncio.sleep(began_s + due_s[index] - time.monotonic())
            tasks.create_task(send(client, index))
    return load


def read_metrics(url: str) -> dict[str, float]:
    """Every sample of /metrics, by its name with labels."""
    text = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}
