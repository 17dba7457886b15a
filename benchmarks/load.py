"""Loads on a running server, from one event loop: clients in a closed loop, or a rate.

In a closed loop each client sends its next request when it has its answer; at a rate (an open
loop) requests go out on time whatever the server does, as those of many strangers would.
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
    """What one request came to.

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
    """The answers of a load, in the order of their coming."""

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
        """Makes sure that every answer is 200.

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


def open_client(url: str) -> aiohttp.ClientSession:
    """A client with as many connections as a load needs."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout)


async def run_closed_loop(
    url: str,
    bodies: Sequence[bytes],
    *,
    clients: int,
    may_go_on: Callable[[int], bool],
    path: str = "/segment",
) -> Load:
    """Clients that each wait for their answer.

    Args:
        url: The server.
        bodies: Images; client i begins with the i-th and goes on from there.
        clients: How many at once.
        may_go_on: Told how many requests have been sent; no more are once it says no.
        path: With its query.
    """
    load, sent = Load(), itertools.count()

    async def run_client(client: aiohttp.ClientSession, first: int) -> None:
        for turn in itertools.count(first):
            if not may_go_on(next(sent)):
                return
            load.answers.append(await ask(client, path, bodies[turn % len(bodies)]))

    async with open_client(url) as client:
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
    """Requests at random moments (a Poisson process).

    Args:
        url: The server.
        bodies: Images, in turn.
        per_second: Mean rate.
        count: Requests.
        path: With its query.
        seed: Of the moments.
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
