"""Threads for decoding and encoding, handed out by rank instead of by arrival."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Entry:
    """A step that waits; it is dropped at once when its caller leaves, or when it runs."""

    step: Callable[[], Any] | None
    done: asyncio.Future[Any] | None = None

    def drop(self) -> None:
        """If it still waits it never runs, and what it holds is free."""
        self.step = None


class RankedPool:
    """A thread pool whose waiting steps run in the order of their ranks, lowest first.

    Every image pays for it several times, so it does little: a token in a queue wakes a thread,
    which takes the step of the lowest rank, and a step that ends wakes the event loop once. A
    step whose caller is cancelled while it waits never runs.

    Args:
        threads: How many steps run at once. They begin with the first step, and the end of the
            process does not wait for them.
        name: Prefix of the threads' names.
    """

    def __init__(self, threads: int, name: str) -> None:
        names = [f"{name}_{index}" for index in range(threads)]
        self._threads = [threading.Thread(target=self._run_all, name=n, daemon=True) for n in names]
        self._lock = threading.Lock()
        self._is_started = self._is_shut_down = False
        self._tokens: SimpleQueue[bool] = SimpleQueue()
        self._waiting: list[tuple[float, int, Entry]] = []
        self._arrivals = itertools.count()

    async def run(self, step: Callable[[], T], rank: float) -> T:
        """Runs a step in a thread; among equal ranks the first to come is the first to run.

        Raises:
            RuntimeError: The pool has been shut down.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        entry = Entry(step, done)
        self._put(entry, rank)
        try:
            return await done
        except asyncio.CancelledError:
            entry.drop()
            raise

    def submit(self, step: Callable[[], None], rank: float) -> Entry:
        """Runs a step in a thread that nobody waits for; any thread may call it.

        Args:
            step: Must not raise.
            rank: See `run`.

        Raises:
            RuntimeError: The pool has been shut down.
        """
        entry = Entry(step)
        self._put(entry, rank)
        return entry

    def replace(self, thread: threading.Thread) -> bool:
        """Another thread takes the place of one that may never come back from its step.

        Returns:
            Whether it is the pool's.
        """
        with self._lock:
            if thread not in self._threads:
                return False
            place = self._threads.index(thread)
            other = threading.Thread(target=self._run_all, name=thread.name, daemon=True)
            self._threads[place] = other
        other.start()
        return True

    def _put(self, entry: Entry, rank: float) -> None:
        with self._lock:
            if self._is_shut_down:
                raise RuntimeError("the pool has been shut down")
            heapq.heappush(self._waiting, (rank, next(self._arrivals), entry))
            is_first, self._is_started = not self._is_started, True
        for thread in self._threads if is_first else ():
            thread.start()
        self._tokens.put(True)

    def shutdown(self) -> None:
        """Drops what waits; steps that run are left to end."""
        with self._lock:
            self._is_shut_down = True
            self._waiting.clear()
        for _ in self._threads:
            self._tokens.put(False)

    def _run_all(self) -> None:
        """In a thread: runs steps until the pool is shut down, or the thread is replaced."""
        while threading.current_thread() in self._threads and self._tokens.get():
            with self._lock:
                entry = heapq.heappop(self._waiting)[-1] if self._waiting else None
            if entry is not None:
                self._run(entry)
            del entry  # the next step may be long in coming

    @staticmethod
    def _run(entry: Entry) -> None:
        step, entry.step = entry.step, None
        if step is None:
            return
        if entry.done is None:
            step()
            return
        if entry.done.cancelled():
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
