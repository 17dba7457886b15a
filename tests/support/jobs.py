"""Jobs as the store takes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from service.jobs.records import Claim, FileResult, JobFile, JobOptions, JobRecord, Submission
from service.jobs.store import JobStore

_ids = itertools.count()
OK = FileResult("m:1", {"file_name": "x"}, ({"score": 0.5},))
FAILED = FileResult("", {"file_name": "x", "error": {"code": "corrupt_image", "message": "no"}})


def build_submission(
    files: int | Sequence[JobFile] = 1,
    *,
    owner: str = "ann",
    idempotency: str | None = None,
    fingerprint: str = "same",
    **options: Any,
) -> Submission:
    """A job of that many uploads, or of files."""
    if isinstance(files, int):
        files = [JobFile(f"{n}.png", data=b"data %d" % n) for n in range(1, files + 1)]
    return Submission(
        id=f"job{next(_ids)}",
        owner=owner,
        idempotency=idempotency,
        fingerprint=fingerprint,
        options=JobOptions(model="m", **options),
        files=files,
    )


def accept(store: JobStore, files: int | Sequence[JobFile] = 1, **fields: Any) -> JobRecord:
    """An accepted job."""
    return store.accept(build_submission(files, **fields), None)[0]


def finish_all(store: JobStore, worker: str = "w", result: FileResult = OK) -> list[Claim]:
    """Processes every file that is not taken."""
    done = []
    while claims := store.claim(worker, 100):
        for claim in claims:
            assert store.finish(worker, claim, result)
        done += claims
    return done


def numbers_of(store: JobStore, job: JobRecord) -> list[int]:
    """The files that have an entry."""
    return [number for number, _, _ in store.iterate_results(job.id)]
