"""Threads for decoding and encoding, handed out by rank instead of by arrival."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class RankedPool:
    """A thread pool whose waiting steps run in the order of their ranks, lowest first.

    Belongs to one event loop. A step whose caller is cancelled while it waits never runs.

    Args:
        threads: How many steps run at once.
        name: Prefix of the threads' names.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        # One step is always handed over ahead, so that no thread waits for the event loop.
        self._free = threads + 1
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    async def run(self, step: Callable[[], T], rank: float) -> T:
        """Runs a step in a thread; among equal ranks the first to come is the first to run."""
        await self._take_place(rank)
        loop = asyncio.get_running_loop()
        try:
            work = self._executor.submit(step)
        except BaseException:
            self._give_place()
            raise

        def free(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._give_place)

        work.add_done_callback(free)  # when the thread is free, not when the caller has left
        return await asyncio.wrap_future(work)

    def shutdown(self) -> None:
        """Drops what waits; steps that run are left to end."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _take_place(self, rank: float) -> None:
        if self._free:
            self._free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._arrivals), place))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it was given in the same moment
                self._give_place()
            raise

    def _give_place(self) -> None:
        while self._waiting:
            _, _, place = heapq.heappop(self._waiting)
            if not place.done():
                place.set_result(None)
                return
        self._free += 1
