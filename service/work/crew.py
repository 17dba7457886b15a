"""Threads that take one step after another."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

Step = Callable[[], None]


class Crew:
    """A set of daemon threads that share a lock with their work queue.

    The threads start when there is work. They may never return from a step, so the end of the
    process does not wait for them longer than `join` did.

    Args:
        name: Of the threads.
        lock: Guards the work queue; `wake`, `resize`, `replace` and `stop` need it to be held.
        next_step: Called with the lock held: the next step; or after how many seconds there may be
            one; or None, if there is one only after `wake`.
        threads: Their number.
    """

    def __init__(
        self,
        name: str,
        lock: threading.Lock,
        next_step: Callable[[], Step | float | None],
        threads: int,
    ) -> None:
        self._name = name
        self._next = next_step
        self._size = threads
        self._lock = lock
        self._threads: set[threading.Thread] = set()
        self._running: set[threading.Thread] = set()  # those that were replaced, too
        self._idle: list[threading.Lock] = []

    def wake(self, count: int = 1) -> None:
        """Lets up to `count` idle threads, or new ones, look for a step."""
        while count and self._idle:
            self._idle.pop().release()  # the one that was busy last: its caches are warm
            count -= 1
        for _ in range(min(count, self._size - len(self._threads))):
            self._start()

    def resize(self, threads: int) -> None:
        """Changes the number of threads; surplus ones end after their step."""
        self._size = threads
        self.wake(len(self._idle))

    def replace(self, thread: threading.Thread) -> bool:
        """Starts another thread in place of one that may never return from its step.

        Returns:
            Whether it is one of these threads.
        """
        if thread not in self._threads:
            return False
        self._threads.discard(thread)
        if len(self._threads) < self._size:
            self._start()
        return True

    def stop(self) -> None:
        """Ends the threads after their steps."""
        self.resize(0)

    def join(self, timeout_s: float) -> None:
        """Waits until the threads have ended; the lock must not be held.

        A thread that returns from C++ code while the interpreter shuts down aborts the process.
        """
        with self._lock:
            running = tuple(self._running)
        deadline_s = time.monotonic() + timeout_s
        for thread in running:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._threads.add(thread)
        self._running.add(thread)
        thread.start()

    def _run(self) -> None:
        thread = threading.current_thread()
        while (step := self._wait(thread)) is not None:
            try:
                step()
            except BaseException:  # the thread goes on with the next step
                logger.exception("a step failed")
            del step  # it refers to an image
        with self._lock:
            self._running.discard(thread)

    def _wait(self, thread: threading.Thread) -> Step | None:
        """The next step, or None when the thread has to end."""
        with self._lock:
            while thread in self._threads and len(self._threads) <= self._size:
                step = self._next()
                if callable(step):
                    return step
                self._sleep(step)
            self._threads.discard(thread)
            return None

    def _sleep(self, seconds: float | None) -> None:
        """Releases the lock until `wake`, or for as long as given."""
        waiter = threading.Lock()
        waiter.acquire()
        self._idle.append(waiter)
        self._lock.release()
        try:
            woken = waiter.acquire(timeout=-1 if seconds is None else seconds)
        finally:
            self._lock.acquire()
        if not woken and waiter in self._idle:
            self._idle.remove(waiter)
