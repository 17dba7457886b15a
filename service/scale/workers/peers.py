"""Metrics of all workers: the one that is asked collects those of the others.

The parent gives it one end of a pair of sockets for each of them, and the other end to the worker
that writes its metrics there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import socket
from collections.abc import Callable, Sequence
from typing import Any

from service.background import spawn
from service.scale.merged_metrics import MergedMetrics, Report

logger = logging.getLogger(__name__)

TIMEOUT_S = 2.0
_CHUNK_BYTES = 1 << 16


class Peers:
    """The other workers, as far as metrics are concerned; needs a running event loop.

    Args:
        index: This worker's number.
        count: Of workers.
        ask: Asks the parent for the metrics of all others; called with a tag. For each of them
            `read_from` must then be called with that tag.

    Attributes:
        metrics: This worker's, which answers for all.
    """

    def __init__(self, index: int, count: int, ask: Callable[[int], None]) -> None:
        self.metrics = MergedMetrics(self.collect_all)
        self._index = index
        self._others = [number for number in range(count) if number != index]
        self._ask = ask
        self._tags = itertools.cycle(range(1 << 32))
        self._expected: dict[tuple[int, int], asyncio.Future[bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def collect_all(self) -> Sequence[Report]:
        """Every worker's metrics; one that does not answer in time is left out."""
        tag, loop = next(self._tags), asyncio.get_running_loop()
        keys = [(tag, number) for number in self._others]
        for key in keys:
            self._expected[key] = loop.create_future()
        self._ask(tag)
        try:
            own = await self.metrics.collect()
            futures = [self._expected[key] for key in keys]
            if futures:
                await asyncio.wait(futures, timeout=TIMEOUT_S)
        finally:
            answers = [(number, self._expected.pop((tag, number))) for number in self._others]
        reports = [(self._index, own)]
        for number, answer in answers:
            try:
                reports.append((number, await asyncio.to_thread(pickle.loads, answer.result())))
            except (asyncio.InvalidStateError, EOFError, pickle.UnpicklingError):
                logger.warning("/metrics is without worker %d, which does not answer", number)
        return [(str(number), report) for number, report in sorted(reports, key=lambda r: r[0])]

    def read_from(self, number: int, tag: int, connection: socket.socket | None) -> None:
        """Reads another worker's metrics; None if it is not available."""
        answer = self._expected.get((tag, number))
        if connection is None:
            if answer is not None and not answer.done():
                answer.set_result(b"")
        elif answer is None:
            connection.close()  # too late
        else:
            spawn(_read(connection, answer), self._tasks)

    def write_to(self, connection: socket.socket | None) -> None:
        """Writes this worker's metrics for another one."""
        if connection is not None:
            spawn(self._write(connection), self._tasks)

    async def _write(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connection:
            connection.setblocking(False)
            data = await asyncio.to_thread(pickle.dumps, await self.metrics.collect())
            try:
                await asyncio.wait_for(loop.sock_sendall(connection, data), TIMEOUT_S)
            except (OSError, TimeoutError) as error:
                logger.debug("the metrics are not read: %r", error)


async def _read(connection: socket.socket, answer: asyncio.Future[bytes]) -> None:
    """Reads until the end; an answer of no bytes if that fails."""
    loop = asyncio.get_running_loop()
    chunks: list[Any] = []
    with connection:
        connection.setblocking(False)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while chunk := await loop.sock_recv(connection, _CHUNK_BYTES):
                    chunks.append(chunk)
        except (OSError, TimeoutError):
            chunks = []
    if not answer.done():
        answer.set_result(b"".join(chunks))
