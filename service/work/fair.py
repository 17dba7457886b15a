"""Fair queueing: the flow that has received the least service is served next.

Start-time fair queueing, counted in canvases (as VTC, arXiv 2401.00588, counts tokens). A flow that
becomes busy starts at the queue's virtual time, so an idle flow saves up no credit. The first
`BURST` canvases after that are charged `BURST_CHARGE` each, so that short requests pass long ones.

Bound: between two flows that both have work waiting all the time, the canvases served per unit of
weight differ by at most `BURST * (1 - BURST_CHARGE) + 2`, whatever the length of time.
A flow that always has work, among at most n of the same weight in the queue, is served at least
once in `n / BURST_CHARGE + n` canvases, even if the others are new all the time
(`n / BURST_CHARGE + n * BURST` if they do not take turns during their bursts).
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import Generic, TypeVar

BURST = 12
"""Canvases that are charged less after a flow was idle: three images of 256x256 px in 4 tiles."""
BURST_CHARGE = 1 / 3


@dataclass(eq=False)
class Flow:
    """Something that queues canvases: a client, or a request of a client.

    Attributes:
        weight: Its share relative to other flows.
        tag: Virtual time from which it may be served again.
        burst: Canvases that are still charged `BURST_CHARGE`.
        in_turns: Whether every canvas of the burst is charged at once, so that flows take turns;
            otherwise the burst is charged when it is over: short flows end in their order, which
            takes less time on average.
        queued: Whether it is in its queue.
        arrival: Order between equal tags.
    """

    weight: float = 1.0
    tag: float = 0.0
    burst: int = BURST
    in_turns: bool = True
    queued: bool = False
    arrival: int = -1

    def charge(self) -> None:
        """Counts one canvas."""
        if not self.burst:
            self.tag += 1 / self.weight
            return
        self.burst -= 1
        if self.in_turns:
            self.tag += BURST_CHARGE / self.weight
        elif not self.burst:
            self.tag += BURST * BURST_CHARGE / self.weight


F = TypeVar("F", bound=Flow)


class FairQueue(Generic[F]):
    """Flows with work waiting, least served first, then by arrival; not thread-safe."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, F]] = []
        self._time = 0.0
        self._arrivals = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._heap)

    def push(self, flow: F) -> None:
        """Adds a flow; does nothing if it is in the queue already."""
        if not flow.queued:
            flow.queued = True
            if flow.tag < self._time or flow.arrival < 0:
                flow.tag = max(flow.tag, self._time)
                flow.arrival = next(self._arrivals)
            heapq.heappush(self._heap, (flow.tag, flow.arrival, flow))

    def first(self) -> F | None:
        """The flow that has received the least service; it stays in the queue. None if empty."""
        return self._heap[0][2] if self._heap else None

    def served(self, flow: F, *, goes_on: bool) -> None:
        """The first flow has been served and charged.

        Args:
            flow: What `first` gave.
            goes_on: Whether it stays in the queue, at its new place.
        """
        heap = self._heap
        # Flows that come for one canvas each do not advance the first tag: time advances by itself,
        # at most as fast as the tags of flows with work, so that none of these starves.
        self._time = max(heap[0][0], self._time + BURST_CHARGE / (flow.weight * len(heap)))
        if goes_on:
            if flow.tag != heap[0][0]:
                flow.arrival = next(self._arrivals)
            heapq.heapreplace(heap, (flow.tag, flow.arrival, flow))
        else:
            heapq.heappop(heap)
            flow.queued = False
