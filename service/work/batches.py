"""Canvases before and after the engine, where different images share engine calls."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.observe.timing import Interval
from service.work.image import ImageWork
from service.work.policy import Policy
from service.work.queue import Job

Shape = tuple[int, ...]


@dataclass(eq=False)
class _SharedCall:
    """An engine call: its canvases, and how many of them are not post-processed."""

    size: int
    left: int


@dataclass(eq=False)
class Canvas:
    """A canvas from its creation to its post-processing.

    Attributes:
        ready_s: When it was created.
        candidates, call, share: Set by the engine call: what it found, when it ran, and one over
            the canvases in it.
        batch: The engine call that it shares with others.
    """

    job: Job
    image: ImageWork
    index: int
    tile: Tile
    ready_s: float
    candidates: TileCandidates | None = None
    call: Interval = (0.0, 0.0)
    share: float = 1.0
    batch: _SharedCall | None = None


@dataclass(eq=False)
class Batches:
    """Buckets, results and engine calls of a scheduler; not thread-safe.

    Attributes:
        preparing: Canvases that threads are creating.
        buckets: Created, by shape, oldest first.
        retry: Of batches that failed; each runs alone.
        results: Not post-processed yet.
        calls: Engine calls in flight.
        pinned: Canvases of calls in flight, and of those that are not wholly post-processed.
    """

    preparing: int = 0
    buckets: dict[Shape, list[Canvas]] = field(default_factory=dict)
    retry: deque[Canvas] = field(default_factory=deque)
    results: deque[Canvas] = field(default_factory=deque)
    calls: int = 0
    pinned: int = 0

    @property
    def waiting(self) -> int:
        """Canvases that wait for an engine call."""
        return len(self.retry) + sum(map(len, self.buckets.values()))

    def put(self, canvas: Canvas) -> None:
        """Adds a canvas that was created."""
        self.buckets.setdefault(canvas.tile.image.shape, []).append(canvas)

    def take(self, policy: Policy, *, at_once: bool) -> list[Canvas]:
        """The canvases of the next engine call, which is counted; empty if none may start.

        Args:
            policy: Calls at once, batch size, delay, and the most canvases that are pinned.
            at_once: Nothing waits for its delay.
        """
        if self.calls >= policy.calls:
            return []
        if self.pinned >= policy.max_pinned:
            return []  # their memory must be released first
        batch: list[Canvas] = []
        while self.retry and not batch:
            batch = _needed([self.retry.popleft()])
        due_s = time.monotonic() - (float("-inf") if at_once else policy.max_delay_s)
        while not batch:
            ripe = [b for b in self.buckets.values() if _is_ripe(b, policy.max_batch, due_s)]
            if not ripe:
                break
            bucket = min(ripe, key=lambda canvases: canvases[0].ready_s)
            taken = bucket[: policy.max_batch]
            del bucket[: policy.max_batch]
            if not bucket:
                del self.buckets[taken[0].tile.image.shape]
            batch = _needed(taken)
        if batch:
            call = _SharedCall(len(batch), len(batch))
            for canvas in batch:
                canvas.batch = call
            self.calls += 1
            self.pinned += call.size
        return batch

    def returned(self, batch: Sequence[Canvas]) -> None:
        """The engine call of a batch has returned."""
        self.calls -= 1
        self.results.extend(batch)

    def failed(self, batch: Sequence[Canvas]) -> None:
        """The engine call of a batch has failed; its canvases may be taken again."""
        self.calls -= 1
        self.pinned -= len(batch)
        for canvas in batch:
            canvas.batch = None

    def searched(self, canvas: Canvas) -> None:
        """A canvas of `results` has been post-processed, or nobody needs it."""
        call, canvas.batch = canvas.batch, None
        if call is None:
            return
        call.left -= 1
        if call.left == 0:
            self.pinned -= call.size

    def seconds_until_ripe(self, policy: Policy) -> float | None:
        """Seconds until a batch may start; None: the end of a call or of a canvas comes first."""
        if not self.buckets or self.calls >= policy.calls or self.pinned >= policy.max_pinned:
            return None
        first_s = min(bucket[0].ready_s for bucket in self.buckets.values())
        return max(0.0, first_s + policy.max_delay_s - time.monotonic())


def _is_ripe(bucket: Sequence[Canvas], max_batch: int, due_s: float) -> bool:
    """Whether a bucket is full, or its first canvas was created before `due_s`."""
    return len(bucket) >= max_batch or bucket[0].ready_s <= due_s


def _needed(canvases: Sequence[Canvas]) -> list[Canvas]:
    """Canvases whose images somebody still needs."""
    return [canvas for canvas in canvases if not canvas.job.skips(canvas.image)]
