"""How long jobs that are done are kept."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from service.jobs.records import JobRecord
from service.jobs.store import JobStore

LEAST_S = 3600.0
"""How long a process knows a job as done before it deletes it, whatever the wall clock says: after
a jump of the clock, or a long time off, its results can still be fetched."""


class Retention:
    """Deletes jobs that are done.

    Args:
        keep_s: Age at which one is deleted, seconds.
        max_bytes: Uploads and results of all jobs; beyond it the earliest job that is done is
            deleted, of the owner whose jobs have the most bytes.
        wall_clock: Seconds.
        clock: Monotonic, seconds.
    """

    def __init__(
        self,
        keep_s: float,
        max_bytes: int,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._wall_clock = wall_clock
        self._clock = clock
        self._seen_s: dict[str, float] = {}

    def apply(self, store: JobStore, needed: int = 0) -> list[str]:
        """Deletes what is due; returns the ids.

        Args:
            store: The jobs.
            needed: Bytes of a job that is to be accepted.
        """
        now_s, finished = self._clock(), store.list_finished()
        self._seen_s = {job.id: self._seen_s.get(job.id, now_s) for job in finished}
        least_s = min(LEAST_S, self._keep_s)
        old = [job for job in finished if now_s - self._seen_s[job.id] >= least_s]
        due_s = self._wall_clock() - self._keep_s
        due = [job for job in old if job.finished_s is not None and job.finished_s <= due_s]
        due += self._find_surplus(store, [job for job in old if job not in due], due, needed)
        for job in due:
            store.delete(job)
        store.vacuum()
        return [job.id for job in due]

    def _find_surplus(
        self, store: JobStore, rest: list[JobRecord], due: list[JobRecord], needed: int
    ) -> list[JobRecord]:
        surplus = store.count_bytes() + needed - self._max_bytes - sum(job.bytes for job in due)
        held = Counter[str]()
        for job in rest:
            held[job.owner] += job.bytes
        found = []
        while surplus > 0 and rest:
            owner = max((job.owner for job in rest), key=lambda owner: held[owner])
            job = next(job for job in rest if job.owner == owner)
            rest.remove(job)
            found.append(job)
            held[owner] -= job.bytes
            surplus -= job.bytes
        return found
