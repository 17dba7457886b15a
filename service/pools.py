"""Threads for decoding and encoding, handed out by rank instead of by arrival."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Entry:
    """A step that waits; it is dropped at once when its caller leaves, or when it runs."""

    step: Callable[[], Any] | None
    done: asyncio.Future[Any]


class RankedPool:
    """A thread pool whose waiting steps run in the order of their ranks, lowest first.

    A thread takes the next step by itself, and a step that ends wakes the event loop once: both
    are paid for every image. A step whose caller is cancelled while it waits never runs.

    Args:
        threads: How many steps run at once.
        name: Prefix of the threads' names.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._idle = threads
        self._waiting: list[tuple[float, int, _Entry]] = []
        self._arrivals = itertools.count()

    async def run(self, step: Callable[[], T], rank: float) -> T:
        """Runs a step in a thread; among equal ranks the first to come is the first to run."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        entry = _Entry(step, done)
        with self._lock:
            heapq.heappush(self._waiting, (rank, next(self._arrivals), entry))
            is_thread_needed = self._idle > 0
            self._idle -= is_thread_needed
        if is_thread_needed:
            self._executor.submit(self._run_all)
        try:
            return await done
        except asyncio.CancelledError:
            entry.step = None
            raise

    def shutdown(self) -> None:
        """Drops what waits; steps that run are left to end."""
        with self._lock:
            self._waiting.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run_all(self) -> None:
        """In a thread: runs steps until none waits."""
        while (entry := self._take()) is not None:
            self._run(entry)

    def _take(self) -> _Entry | None:
        with self._lock:
            if self._waiting:
                return heapq.heappop(self._waiting)[-1]
            self._idle += 1
            return None

    @staticmethod
    def _run(entry: _Entry) -> None:
        step, entry.step = entry.step, None
        if step is None or entry.done.cancelled():
            return
        loop = entry.done.get_loop()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            try:
                result = step()
            except BaseException as error:
                loop.call_soon_threadsafe(_fail, entry.done, error)
            else:
                loop.call_soon_threadsafe(_succeed, entry.done, result)


def _succeed(done: asyncio.Future[T], result: T) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)
