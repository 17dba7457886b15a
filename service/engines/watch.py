"""The engine of a served model: a time limit for calls, detection of failed engines, swaps.

An exception may be caused by one image or by the engine: a probe decides. A call that exceeds its
time limit means that the engine has failed; its thread may never return.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import Backend, BackendError, Interruptible
from service.engines.state import EngineBuild, EngineState

logger = logging.getLogger(__name__)

Results = Sequence[TileCandidates]
A = TypeVar("A")
T = TypeVar("T")


class EngineHung(BackendError):
    """A call exceeded its time, or its engine was closed meanwhile."""


@dataclass(eq=False)
class _Call:
    """An engine call in flight.

    Attributes:
        give_up: Called once if the call exceeds its time.
        is_given_up: Whether it was.
    """

    engine: Backend
    deadline_s: float
    give_up: Callable[[], None]
    is_given_up: bool = False


class WatchedEngine:
    """Calls the current engine; thread-safe.

    After an engine has failed, calls wait until another is built: no accepted request is lost. An
    engine that was swapped out is closed after its last call.

    Args:
        engine: The first one.
        probe: Runs an engine on a known-good image; raises if it has failed.
        timeout_s: Longest time of a call.
        on_death: Called once for an engine that failed, with the reason, in any thread.

    Attributes:
        build: A faster engine that is being built; set by its owner.
    """

    def __init__(
        self,
        engine: Backend,
        probe: Callable[[Backend], None],
        *,
        timeout_s: float,
        on_death: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.build: EngineBuild | None = None
        self._engine = engine
        self._probe = probe
        self._timeout_s = timeout_s
        self._on_death = on_death
        self._lock = threading.Lock()
        self._usable = threading.Event()
        self._usable.set()
        self._closed = threading.Event()
        self._calls: set[_Call] = set()
        self._in_use: Counter[Backend] = Counter()
        self._retired: set[Backend] = set()
        self._watchdog: threading.Thread | None = None

    @property
    def current(self) -> Backend:
        """The current engine, which may have failed."""
        return self._engine

    @property
    def state(self) -> EngineState:
        """State of the current engine, for health and metrics."""
        engine = self._engine
        return EngineState(
            name=engine.name,
            device=engine.device,
            precision=engine.precision,
            reason=engine.reason,
            build=self.build,
            is_alive=self.is_alive,
            canvas_s=getattr(engine, "canvas_s", {}),
        )

    @property
    def is_alive(self) -> bool:
        """Whether calls are answered now."""
        return self._usable.is_set() and not self.is_closed

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called: no engine is taken any more."""
        return self._closed.is_set()

    def infer(self, tiles: Sequence[Tile], give_up: Callable[[], None]) -> Results:
        """Runs one batch in the calling thread.

        If the engine fails in the call, the call is repeated once with the next engine.

        Args:
            tiles: B canvases of one shape.
            give_up: Called in another thread if the call exceeds its time or the engine is closed
                meanwhile: the calling thread may never return.

        Returns:
            B entries.

        Raises:
            EngineHung: `give_up` was called.
            Exception: What the engine raised, if it still works, or failed on these canvases twice.
        """
        call = self._enter(give_up)
        engine = call.engine
        try:
            return self._run(call, engine.infer, tiles)
        except EngineHung:
            raise
        except Exception as error:
            if not self._is_dead_after(error, engine, give_up):
                raise
        call = self._enter(give_up)
        return self._run(call, call.engine.infer, tiles)

    def swap(self, engine: Backend) -> None:
        """Makes another engine the current one; the old one is closed after its last call."""
        with self._lock:
            if self._closed.is_set():
                unused: Backend | None = engine
            else:
                old, self._engine = self._engine, engine
                self._retired.add(old)
                self._usable.set()
                unused = self._pop_unused(old)
        if unused is not None:
            _close(unused)

    def close(self) -> None:
        """Closes the engine at once; calls in flight are given up."""
        self._closed.set()
        calls = self._give_up(before_s=math.inf)
        with self._lock:
            self._usable.set()
        _interrupt(self._engine)
        _close(self._engine)
        for call in calls:
            call.give_up()

    def _enter(self, give_up: Callable[[], None], engine: Backend | None = None) -> _Call:
        """Waits for a usable engine, or takes the one given, and counts a call of it."""
        while True:
            if engine is None and not self._usable.is_set():
                self._usable.wait()
            with self._lock:
                if self._closed.is_set():
                    raise BackendError("the engine is closed")
                if engine is None and not self._usable.is_set():
                    continue  # it has just failed
                entered = self._engine if engine is None else engine
                call = _Call(entered, time.monotonic() + self._timeout_s, give_up)
                self._in_use[entered] += 1
                self._calls.add(call)
                if self._watchdog is None:
                    self._watchdog = threading.Thread(
                        target=self._watch, name="watchdog", daemon=True
                    )
                    self._watchdog.start()
                return call

    def _run(self, call: _Call, function: Callable[[A], T], argument: A) -> T:
        """Makes a call that was entered, and leaves it."""
        try:
            return function(argument)
        finally:
            with self._lock:
                self._calls.discard(call)
                self._in_use[call.engine] -= 1
                unused = self._pop_unused(call.engine) if self._retired else None
            if unused is not None:
                _close(unused)
            if call.is_given_up:
                raise EngineHung(self._describe_hang())

    def _pop_unused(self, engine: Backend) -> Backend | None:
        """The engine if it was swapped out and no call uses it; then it is to be closed."""
        if engine not in self._retired or self._in_use[engine]:
            return None
        self._retired.discard(engine)
        del self._in_use[engine]
        return engine

    def _watch(self) -> None:
        """The watchdog thread: gives up calls that exceed their time."""
        while not self._closed.wait(min(1.0, self._timeout_s / 4)):
            for call in self._give_up(before_s=time.monotonic()):
                self._bury(call.engine, self._describe_hang())
                call.give_up()

    def _give_up(self, before_s: float) -> list[_Call]:
        """Marks the calls whose deadline is earlier.

        This comes before anything that interrupts them, which must not look like a failure.
        """
        with self._lock:
            calls = [call for call in self._calls if not call.is_given_up]
            late = [call for call in calls if call.deadline_s < before_s]
            for call in late:
                call.is_given_up = True
            return late

    def _describe_hang(self) -> str:
        return f"a call has not returned after {self._timeout_s:g} s"

    def _is_dead_after(
        self, error: Exception, engine: Backend, give_up: Callable[[], None]
    ) -> bool:
        """Whether an engine that raised has failed; if that is not known yet, it is probed."""
        if self._closed.is_set():
            return False
        if engine is self._engine and self.is_alive:
            try:
                self._run(self._enter(give_up, engine), self._probe, engine)
                return False
            except EngineHung:
                raise
            except Exception as failure:  # an engine's exceptions have no common base
                logger.warning("the engine failed on a known-good image: %r", failure)
        self._bury(engine, f"it raised {error!r} and fails on a known-good image too")
        return True

    def _bury(self, engine: Backend, reason: str) -> None:
        """Stops using an engine and reports its failure, once."""
        with self._lock:
            if engine is not self._engine or not self.is_alive or self._closed.is_set():
                return
            self._usable.clear()
        logger.error("the engine has failed, another is built: %s", reason)
        _interrupt(engine)
        self._on_death(reason)


def _close(engine: Backend) -> None:
    try:
        engine.close()
    except Exception:  # it is not used any more
        logger.exception("the engine %s could not be closed", engine.name)


def _interrupt(engine: Backend) -> None:
    """Ends the calls of an engine, which would use a core until the process ends."""
    if isinstance(engine, Interruptible):
        with contextlib.suppress(Exception):
            engine.interrupt()
