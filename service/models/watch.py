"""An engine that is watched: one that hangs or has died is built anew.

An exception may be the fault of one image or of the engine: a probe tells them apart. A call that
does not come back within its time is always taken as the engine's fault; its thread is abandoned.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import Backend, BackendError, Interruptible, Precision

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0

Results = Sequence[TileCandidates]


class EngineHung(BackendError):
    """A call did not come back in time."""


class RestartingBackend:
    """A `Backend` around another, which it replaces when that has died.

    While a new engine is built, `infer` waits: nothing that was accepted is lost. Only what
    kills the engine when it is alone in a call is given up.

    Args:
        backend: The first engine.
        build: Builds another; called in a thread of its own, again and again until it succeeds.
        probe: Runs an engine on something harmless; raises if it is dead.
        timeout_s: Longest time of a call.
        on_restart: Told when an engine has died and when another is there.
        first_pause_s: Between the first failed attempt to build and the next; it doubles.
    """

    def __init__(
        self,
        backend: Backend,
        build: Callable[[], Backend],
        probe: Callable[[Backend], None],
        *,
        timeout_s: float,
        on_restart: Callable[[bool], None] = lambda alive: None,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._build = build
        self._probe = probe
        self._timeout_s = timeout_s
        self._on_restart = on_restart
        self._first_pause_s = first_pause_s
        self._lock = threading.Lock()
        self._usable = threading.Event()
        self._closed = threading.Event()
        self._calls: set[_Call] = set()
        self._watch: threading.Thread | None = None
        self._take(backend)

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self._backend.name

    @property
    def device(self) -> str:
        """See `Backend`."""
        return self._backend.device

    @property
    def precision(self) -> Precision:
        """See `Backend`."""
        return self._backend.precision

    @property
    def reason(self) -> str:
        """See `Backend`."""
        return self._backend.reason

    @property
    def concurrency(self) -> int:
        """See `Backend`."""
        return self._backend.concurrency

    @property
    def current(self) -> Backend:
        """The engine of the moment."""
        return self._backend

    @property
    def is_alive(self) -> bool:
        """Whether calls are answered now."""
        return self._usable.is_set()

    def infer(self, tiles: Sequence[Tile]) -> Results:
        """See `Backend.infer`.

        Raises:
            EngineHung: The call took too long; another engine is being built.
            Exception: What the engine raised; it is alive, or it died and so did the next one
                on the same tiles.
        """
        return self._infer(partial(self._call, tiles))

    def infer_here(self, tiles: Sequence[Tile], give_up: Callable[[], None]) -> Results:
        """`infer` in the thread that calls, which need not be woken by another.

        Args:
            tiles: See `infer`.
            give_up: Called in another thread if the call takes too long, or the engine is closed
                meanwhile: the thread that is in it may never come back.

        Raises:
            EngineHung: The thread has come back, but was given up.
            Exception: As `infer`.
        """
        return self._infer(partial(self._call_here, tiles, give_up))

    def _infer(self, call: Callable[[Backend, Workers], Results]) -> Results:
        backend, workers = self._wait_until_usable()
        try:
            return call(backend, workers)
        except EngineHung:
            raise
        except Exception as error:
            if self._closed.is_set() or (self._serves(backend) and self._answers(backend, workers)):
                raise
            self._replace(backend, f"it raised {error!r} and fails on a harmless image too")
        return call(*self._wait_until_usable())

    def close(self) -> None:
        """See `Backend.close`; whoever waits for a new engine gets an error."""
        self._closed.set()
        calls = self._mark_given_up(before_s=math.inf)
        with self._lock:
            self._usable.set()
            self._workers.stop()
            self._interrupt()
            self._workers.abandon(BackendError("the engine is closed"))
            self._backend.close()
        for call in calls:
            call.give_up()

    def _take(self, backend: Backend) -> None:
        self._backend = backend
        self._workers = Workers(backend.concurrency)
        self._usable.set()

    def _wait_until_usable(self) -> tuple[Backend, Workers]:
        self._usable.wait()
        with self._lock:
            if self._closed.is_set():
                raise BackendError("the engine is closed")
            return self._backend, self._workers

    def _call(self, tiles: Sequence[Tile], backend: Backend, workers: Workers) -> Results:
        call: Future[Results] = workers.run(backend.infer, tiles)
        try:
            return call.result(self._timeout_s)
        except TimeoutError as error:
            self._replace(backend, self._say_hung())
            raise EngineHung(self._say_hung()) from error

    def _call_here(
        self,
        tiles: Sequence[Tile],
        give_up: Callable[[], None],
        backend: Backend,
        workers: Workers,
    ) -> Results:
        call = _Call(backend, time.monotonic() + self._timeout_s, give_up)
        with self._lock:
            self._calls.add(call)
            if self._watch is None:
                self._watch = threading.Thread(
                    target=self._watch_calls, name="engine-watch", daemon=True
                )
                self._watch.start()
        try:
            return backend.infer(tiles)
        finally:
            with self._lock:
                self._calls.discard(call)
            if call.is_given_up:
                raise EngineHung(self._say_hung())

    def _watch_calls(self) -> None:
        """In a thread of its own: gives up calls that have taken too long."""
        while not self._closed.wait(min(1.0, self._timeout_s / 4)):
            for call in self._mark_given_up(before_s=time.monotonic()):
                self._replace(call.backend, self._say_hung())
                call.give_up()

    def _mark_given_up(self, before_s: float) -> list[_Call]:
        """Marks the calls whose deadline was before then.

        That comes before anything else: what interrupts a call must not look like its failure.
        """
        with self._lock:
            calls = (call for call in self._calls if not call.is_given_up)
            marked = [call for call in calls if call.deadline_s < before_s]
            for call in marked:
                call.is_given_up = True
        return marked

    def _say_hung(self) -> str:
        return f"a call has not come back after {self._timeout_s:g} s"

    def _serves(self, backend: Backend) -> bool:
        """Whether it has not been given up for another call's sake."""
        return backend is self._backend and self._usable.is_set()

    def _answers(self, backend: Backend, workers: Workers) -> bool:
        try:
            workers.run(self._probe, backend).result(self._timeout_s)
        except Exception as error:  # an engine's exceptions have no common base
            logger.warning("the engine failed on a harmless image: %r", error)
            return False
        return True

    def _replace(self, dead: Backend, reason: str) -> None:
        """Builds another engine in the background; does nothing if that is under way."""
        with self._lock:
            if dead is not self._backend or not self._usable.is_set() or self._closed.is_set():
                return
            self._usable.clear()
            self._workers.stop()
        logger.error("the engine is dead, another is built: %s", reason)
        self._on_restart(False)
        rebuild = threading.Thread(target=self._rebuild, name="engine-rebuild", daemon=True)
        rebuild.start()

    def _interrupt(self) -> None:
        """A call that hangs would burn a core until the process ends."""
        if isinstance(self._backend, Interruptible):
            self._backend.interrupt()

    def _rebuild(self) -> None:
        self._interrupt()
        deadline_s = time.monotonic() + 1.0
        ended = self._workers.join(timeout_s=1.0)
        while self._calls and time.monotonic() < deadline_s:
            time.sleep(0.01)
        if ended and not self._calls:  # one that hangs still uses what would be freed
            with contextlib.suppress(Exception):
                self._backend.close()
        pause_s = self._first_pause_s
        while not self._closed.is_set():
            try:
                backend = self._build()
                break
            except Exception as error:  # whatever stands in the way may pass
                logger.error("no new engine yet, next try in %g s: %s", pause_s, error)
            self._closed.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        else:
            return
        with self._lock:
            if self._closed.is_set():
                backend.close()
                return
            self._take(backend)
        logger.info("a new engine is ready on %s (%s)", backend.device, backend.name)
        self._on_restart(True)


@dataclass(eq=False)
class _Call:
    """A call in the thread of who makes it."""

    backend: Backend
    deadline_s: float
    give_up: Callable[[], None]
    is_given_up: bool = False


class Workers:
    """Threads that the end of the process does not wait for, since one may hang for ever."""

    def __init__(self, count: int) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._work = queue.SimpleQueue()
        self._pending: set[Future[Any]] = set()
        names = (f"engine-{index}" for index in range(count))
        self._threads = [threading.Thread(target=self._run, name=n, daemon=True) for n in names]
        for thread in self._threads:
            thread.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Runs a call in one of the threads."""
        done: Future[Any] = Future()
        self._pending.add(done)
        done.add_done_callback(self._pending.discard)
        self._work.put((done, lambda: function(*arguments)))
        return done

    def stop(self) -> None:
        """Ends the threads when they have done what they are at."""
        for _ in self._threads:
            self._work.put(None)

    def abandon(self, error: BackendError) -> None:
        """Whoever waits for a call waits no longer, also if the call hangs."""
        for done in tuple(self._pending):
            with contextlib.suppress(InvalidStateError):  # it came back in this moment
                done.set_exception(error)

    def join(self, timeout_s: float) -> bool:
        """Waits for the threads that were stopped; whether all have ended."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            done, step = item
            with contextlib.suppress(InvalidStateError):  # it was abandoned
                try:
                    done.set_result(step())
                except Exception as error:
                    done.set_exception(error)
            del item, done, step  # the next batch may be long in coming
