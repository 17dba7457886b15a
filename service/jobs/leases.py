"""Finds the workers that have files of jobs and do not live any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

LEASE_S = 5.0
"""A worker whose counter has not changed for so long has lost what it had taken."""
BEAT_S = 1.0
"""Time between two changes of the counter."""


class LeaseWatch:
    """Watches the counters of other workers, by this process's monotonic clock alone.

    Args:
        own: Name of this worker.
        clock: Monotonic, seconds.
    """

    def __init__(self, own: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._own = own
        self._clock = clock
        self._known: dict[str, tuple[object, float]] = {}
        self._looked_s = clock()

    def find_lost(self, beats: Mapping[str, object]) -> list[str]:
        """The workers to take files from.

        Args:
            beats: What changes as long as a worker lives, see `JobStore.read_beats`.
        """
        now_s = self._clock()
        paused = now_s - self._looked_s > LEASE_S  # this process stood still, others may have
        self._looked_s = now_s
        known = {}
        for worker, beat in beats.items():
            before = self._known.get(worker)
            same = before is not None and before[0] == beat and not paused
            known[worker] = (beat, before[1] if same and before is not None else now_s)
        self._known = known
        return [
            worker
            for worker, (_, since_s) in known.items()
            if worker != self._own and now_s - since_s > LEASE_S
        ]
