"""Slots, each of which runs one batch at a time, and the backend that lends them to its callers.

`HostSlot` is a call on the host, `device_slot.DeviceSlot` one on a GPU. `SlotBackend` is the
`Backend` of every engine; engines differ only in the calls that their slots make.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from pipeline.postprocess import TileCandidates
from pipeline.types import Int64, Tile, UInt8
from service.engines.base import BackendError, BackendOptions, Precision, collate, split_batch
from service.engines.builder import Upgrade

WAIT_S = 60.0
"""How long a batch waits for a slot; longer means that one was lost."""

Result = TypeVar("Result")


class Slot(Protocol):
    """Runs one batch at a time."""

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """Runs B canvases of one shape; the results do not depend on the slot any more."""
        ...

    def interrupt(self) -> None:
        """Makes a call in flight raise soon, where the engine can do that."""
        ...

    def close(self) -> None:
        """Frees what the slot holds; it is not in use."""
        ...


class HostSlot:
    """A call with arrays on the host.

    Args:
        run: images [1, H, W, 3] and valid_hw [1, 2] to scores, labels and mask_probs, new arrays
            that nothing writes into afterwards.
        interrupt: Makes `run` raise in another thread.
    """

    def __init__(
        self,
        run: Callable[[UInt8, Int64], Sequence[NDArray[Any]]],
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self.interrupt = interrupt

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """Runs canvases in the calling thread, each in a call of its own.

        A batch makes no canvas cheaper on a CPU, and in a call with several threads ONNX Runtime
        rounds a canvas's masks otherwise if there are others beside it.
        """
        found: list[TileCandidates] = []
        for tile in tiles:
            scores, labels, masks = self._run(*collate([tile]))
            if len(scores) != 1:
                raise BackendError(f"a canvas gave {len(scores)} results")
            found += split_batch(scores, labels, masks, copy=False)
        return found

    def close(self) -> None:
        """Drops the engine."""
        self._run = _refuse


def _refuse(images: UInt8, valid_hw: Int64) -> Sequence[NDArray[Any]]:
    raise BackendError("the engine is closed")


class ThreadSlot:
    """A slot that is built and called in one thread of its own.

    ONNX Runtime needs that: it keeps recorded CUDA graphs for each thread.

    Args:
        build: Gives the slot.
    """

    def __init__(self, build: Callable[[], Slot]) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # A daemon: a call that hangs must not keep the process from ending.
        threading.Thread(target=_serve, args=(self._work,), name="slot", daemon=True).start()
        try:
            self._slot = self._run(build)
        except BaseException:
            self._work.put(None)
            raise

    def _run(self, step: Callable[[], Result]) -> Result:
        done: Future[Result] = Future()
        self._work.put((done, step))
        return done.result()

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """Runs one batch in the slot's thread; waits for it."""
        return self._run(lambda: self._slot.infer(tiles))

    def interrupt(self) -> None:
        """Interrupts the slot's call from the calling thread."""
        self._slot.interrupt()

    def close(self) -> None:
        """Closes the slot and ends its thread."""
        try:
            self._run(self._slot.close)
        finally:
            self._work.put(None)


def _serve(work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (item := work.get()) is not None:
        done, step = item
        try:
            done.set_result(step())
        except BaseException as error:
            done.set_exception(error)
        del item, done, step  # else a batch's results live until the next call


def build_on_each(gpus: Sequence[int], build: Callable[[int], Sequence[Slot]]) -> list[Slot]:
    """Slots on several GPUs, those of different GPUs in turns; one that fails closes the others.

    Args:
        gpus: Ordinals.
        build: Gives the slots of one.
    """
    built: list[Sequence[Slot]] = []
    try:
        for gpu in gpus:
            built.append(build(gpu))
    except BaseException:
        for slot in itertools.chain(*built):
            with contextlib.suppress(Exception):  # the first error is the one to report
                slot.close()
        raise
    turns = itertools.zip_longest(*built)
    return [slot for turn in turns for slot in turn if slot is not None]


def describe_gpus(options: BackendOptions) -> str:
    """` on GPUs 0, 1` where there are several."""
    several = len(options.gpus) > 1
    return f" on GPUs {', '.join(map(str, options.gpus))}" if several else ""


class SlotQueue:
    """Lends slots, those that have been free longest first, so that all GPUs have work.

    A slot whose call failed is lent next: the probe that follows must reach its GPU. One that is
    returned after `close` is closed then.

    Args:
        slots: At least one.
        wait_s: Longest wait of `take`.
    """

    def __init__(self, slots: Sequence[Slot], wait_s: float = WAIT_S) -> None:
        self._free = deque(slots)
        self._wait_s = wait_s
        self._changed = threading.Condition()
        self._closed = False

    def take(self) -> Slot:
        """A free slot; waits for one.

        Raises:
            BackendError: The queue is closed, or no slot was returned in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed, self._wait_s)
            if self._closed:
                raise BackendError("the engine is closed")
            if not self._free:
                raise BackendError(f"no slot was returned within {self._wait_s:g} s")
            return self._free.popleft()

    def give(self, slot: Slot, *, failed: bool = False) -> None:
        """Returns a slot."""
        with self._changed:
            if not self._closed:
                (self._free.appendleft if failed else self._free.append)(slot)
                self._changed.notify()
                return
        slot.close()

    def close(self) -> None:
        """Closes free slots now, lent ones when they are returned; may be called again."""
        with self._changed:
            self._closed = True
            idle, self._free = self._free, deque()
            self._changed.notify_all()
        with contextlib.ExitStack() as closing:  # all of them, also where one fails
            for slot in idle:
                closing.callback(slot.close)


class SlotBackend:
    """A `Backend`: slots and what is said of the engine behind them.

    Attributes:
        name: Kind of engine, e.g. "onnxruntime".
        device: What it runs on, "cpu" or "cuda".
        precision: Of its arithmetic.
        reason: Why this engine on this device, one sentence.
        concurrency: How many threads may be in `infer` at once.
        upgrade: A faster engine that can be built while this one serves, if there is one.
        canvas_s: Seconds of a canvas on this CPU, of the engines that were timed to choose one.

    Args:
        slots: As many as batches in flight, at least one.
        name: See the attributes, as for the following three.
        device: See above.
        precision: See above.
        reason: See above.
        max_batch: Largest batch of a slot, None for any; larger ones are cut.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        name: str,
        device: str,
        precision: Precision,
        reason: str,
        max_batch: int | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self.precision = precision
        self.reason = reason
        self.concurrency = len(slots)
        self.upgrade: Upgrade | None = None
        self.canvas_s: dict[str, float] = {}
        self._slots = slots
        self._queue = SlotQueue(slots)
        self._max_batch = max_batch

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """Runs canvases of one shape in a free slot; waits for one.

        Returns:
            One result a canvas, without empty slots, best first. It owns its memory.

        Raises:
            BackendError: The engine is closed or fails, or no slot was returned in time.
        """
        step = self._max_batch or max(1, len(tiles))
        found: list[TileCandidates] = []
        for start in range(0, len(tiles), step):
            found += self._infer(tiles[start : start + step])
        return found

    def _infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        slot = self._queue.take()
        failed = True
        try:
            found = slot.infer(tiles)
            failed = False
            return found
        except BackendError:
            raise
        except Exception as error:  # the engines' exceptions have no common base
            shape = (len(tiles), *tiles[0].image.shape)
            raise BackendError(f"{self.name} failed on images {shape}: {error}") from error
        finally:
            self._queue.give(slot, failed=failed)

    def interrupt(self) -> None:
        """Makes calls on the host raise soon; the engine is not used any more."""
        for slot in self._slots:
            slot.interrupt()

    def close(self) -> None:
        """Frees the engine; calls in flight keep their slots until they return."""
        self._queue.close()
