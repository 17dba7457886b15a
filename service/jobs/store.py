"""The jobs of a server in their SQLite file, which all its processes share.

Every method is one transaction. A file of a job is in `pending` until its entry is stored; the same
transaction stores the entry and removes the file, so it has exactly one. Whoever processes a file
has taken it (a lease): the row names the worker, and a counter that the worker raises shows that it
lives. Clocks do not matter for that.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from service.errors import IdempotencyKeyReused, QuotaExceeded, StorageFull, UnknownJob
from service.jobs.database import Database
from service.jobs.records import Claim, FileResult, JobOptions, JobRecord, Submission

FILE_NAME = "jobs.sqlite"
WEBHOOK = 0
"""Number of a job's webhook among its files."""
_COLUMNS = (
    "seq, id, owner, options, created_s, finished_s, files, done, failed, bytes, served,"
    " webhook_state, webhook_attempts, webhook_error,"
    " (SELECT count(*) FROM pending"
    "  WHERE job = seq AND worker IS NOT NULL AND number != 0) AS taken"
)
_NAMES = [name.strip().rpartition(" ")[2] for name in _COLUMNS.split(",")]
_VACUUM_PAGES = 1000


class JobStore:
    """The open file.

    Args:
        folder: Where the file is; it is made.
        max_bytes: Uploads and results of all jobs; beyond it nothing is accepted.
        clock: Wall clock, seconds; only shown, and used for the age of results.

    Raises:
        JournalError: It cannot be used.
        OSError: The folder cannot be made.
    """

    def __init__(
        self, folder: Path, max_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._database = Database(folder / FILE_NAME, shared=True)
        self._max_bytes = max_bytes
        self._clock = clock

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    # --- clients --------------------------------------------------------------------------------

    def accept(self, submission: Submission, max_open_files: int | None) -> tuple[JobRecord, bool]:
        """Stores a job.

        Args:
            submission: The job.
            max_open_files: Files of the owner that may be unfinished at once; None: no bound.

        Returns:
            The job, and whether it is new: an earlier one may have the same idempotency key.

        Raises:
            IdempotencyKeyReused: The earlier one is another job.
            QuotaExceeded: The owner has too many unfinished files.
            StorageFull: The bound on the bytes is reached.
        """
        database = self._database
        size = sum(len(file.data or b"") for file in submission.files)
        with database.transaction():
            earlier = self.find_earlier(
                submission.owner, submission.idempotency, submission.fingerprint
            )
            if earlier is not None:
                return earlier, False
            self._check_room(submission, size, max_open_files)
            database.execute(
                "INSERT INTO jobs (id, owner, idempotency, fingerprint, options, created_s, files,"
                " bytes, served, turn) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?,"
                " (SELECT coalesce(max(turn), 0) FROM jobs WHERE finished_s IS NULL))",
                *(submission.id, submission.owner, submission.idempotency),
                *(submission.fingerprint, orjson.dumps(asdict(submission.options))),
                *(self._clock(), len(submission.files), size, b"{}"),
            )
            seq = database.value("SELECT seq FROM jobs WHERE id = ?", submission.id)
            database.execute_many(
                "INSERT INTO pending (job, number, name, source) VALUES (?, ?, ?, ?)",
                ((seq, n, file.name, file.source) for n, file in enumerate(submission.files, 1)),
            )
            database.execute_many(
                "INSERT INTO uploads VALUES (?, ?, ?)",
                (
                    (seq, number, file.data)
                    for number, file in enumerate(submission.files, 1)
                    if file.data is not None
                ),
            )
            return self._read("id = ?", submission.id)[0], True

    def find_earlier(
        self, owner: str, idempotency: str | None, fingerprint: str
    ) -> JobRecord | None:
        """The job that a submission has made before; None if it has made none.

        Raises:
            IdempotencyKeyReused: The key is that of another submission.
        """
        if idempotency is None:
            return None
        found = self._read("owner = ? AND idempotency = ?", owner, idempotency)
        if not found:
            return None
        query = "SELECT fingerprint FROM jobs WHERE seq = ?"
        if self._database.value(query, found[0].seq) != fingerprint:
            raise IdempotencyKeyReused(
                f"the idempotency key {idempotency!r} is that of job {found[0].id}, which has "
                "other files or parameters"
            )
        return found[0]

    def _check_room(self, submission: Submission, size: int, max_open_files: int | None) -> None:
        count, value = len(submission.files), self._database.value
        if max_open_files is not None:
            query = "SELECT sum(files - done - failed) FROM jobs WHERE owner = ?"
            unfinished = (value(query, submission.owner) or 0) + count
            if unfinished > max_open_files:
                raise QuotaExceeded(
                    f"the jobs would have {unfinished} unfinished files, the key allows "
                    f"{max_open_files}",
                    "key_job_files",
                    60,
                )
        used = self.count_bytes() + size
        if used > self._max_bytes:
            raise StorageFull(
                f"uploads and results of jobs would have {used} bytes, the limit is "
                f"{self._max_bytes}; delete jobs that are done"
            )

    def find(self, owner: str, job: str) -> JobRecord:
        """A job of an owner.

        Raises:
            UnknownJob: The owner has none of that id.
        """
        found = self._read("owner = ? AND id = ?", owner, job)
        if not found:
            raise UnknownJob(f"there is no job {job!r}")
        return found[0]

    def read_job(self, claim: Claim) -> JobRecord | None:
        """The job of a claim; None if it was deleted."""
        return next(iter(self._read("seq = ?", claim.seq)), None)

    def list_jobs(self, owner: str, most: int, before: str | None = None) -> list[JobRecord]:
        """An owner's jobs, the latest first.

        Args:
            owner: Whose.
            most: How many.
            before: Id of the job after which the list goes on; None: from the latest.

        Raises:
            UnknownJob: The owner has no job of that id.
        """
        seq = 2**62 if before is None else self.find(owner, before).seq
        return self._read("owner = ? AND seq < ? ORDER BY seq DESC LIMIT ?", owner, seq, most)

    def iterate_results(self, job: str) -> Iterator[tuple[int, bytes, bytes]]:
        """Number, properties and instances of a job's files, as JSON, as they are now."""
        for key, properties, instances in self._database.iterate_entries(job):
            yield int(key), properties, instances

    def delete(self, job: JobRecord) -> None:
        """Deletes a job; what workers are doing for it is discarded."""
        database = self._database
        with database.transaction():
            for table in ("pending", "uploads"):
                database.execute(f"DELETE FROM {table} WHERE job = ?", job.seq)
            database.execute("DELETE FROM entries WHERE run = ?", job.id)
            database.execute("DELETE FROM jobs WHERE seq = ?", job.seq)

    # --- workers --------------------------------------------------------------------------------

    def claim(self, worker: str, most: int) -> list[Claim]:
        """Takes files for a worker: of the owner with the fewest taken, of its jobs in turn.

        Of a job those come first that were taken least often: a file that ends its process does
        not keep the others waiting.
        """
        database, claims = self._database, list[Claim]()
        if not database.value("SELECT 1 FROM pending WHERE worker IS NULL AND number > 0 LIMIT 1"):
            return claims
        with database.transaction():
            jobs = self._read("finished_s IS NULL ORDER BY turn, seq")
            taken = Counter[str]()
            for job in jobs:
                taken[job.owner] += job.taken
            turn = database.value("SELECT max(turn) FROM jobs") or 0
            while len(claims) < most and jobs:
                job = min(jobs, key=lambda job: taken[job.owner])  # the first of equal ones
                jobs.remove(job)
                claim = self._take(worker, job)
                if claim is None:
                    continue
                claims.append(claim)
                jobs.append(job)
                taken[job.owner] += 1
                turn += 1
                database.execute("UPDATE jobs SET turn = ? WHERE seq = ?", turn, job.seq)
        return claims

    def claim_webhooks(self, worker: str) -> Sequence[Claim]:
        """Takes the webhooks of jobs that are done."""
        where = "webhook_state = 'waiting' AND finished_s IS NOT NULL"
        if not self._database.value(f"SELECT 1 FROM jobs WHERE {where} LIMIT 1"):
            return ()
        with self._database.transaction():
            claims = [self._take(worker, job, webhook=True) for job in self._read(where)]
        return [claim for claim in claims if claim is not None]

    def _take(self, worker: str, job: JobRecord, *, webhook: bool = False) -> Claim | None:
        rows = self._database.rows(
            "SELECT number, name, source, attempts FROM pending WHERE job = ? AND worker IS NULL"
            f" AND number {'=' if webhook else '>'} {WEBHOOK} ORDER BY attempts, number LIMIT 1",
            job.seq,
        )
        for number, name, source, attempts in rows:
            self._database.execute(
                "UPDATE pending SET worker = ?, beat = 0, attempts = attempts + 1"
                " WHERE job = ? AND number = ?",
                *(worker, job.seq, number),
            )
            return Claim(
                seq=job.seq,
                job=job.id,
                options=job.options,
                number=number,
                name=name,
                source=source,
                attempts=attempts + 1,
            )
        return None

    def beat(self, worker: str) -> set[tuple[int, int]]:
        """Shows that a worker lives; returns the places that it has still taken."""
        with self._database.transaction():
            self._database.execute("UPDATE pending SET beat = beat + 1 WHERE worker = ?", worker)
            rows = self._database.rows("SELECT job, number FROM pending WHERE worker = ?", worker)
        return {(seq, number) for seq, number in rows}

    def read_beats(self) -> dict[str, tuple[int, int]]:
        """What changes as long as a worker lives, of every worker that has taken something."""
        rows = self._database.rows(
            "SELECT worker, total(beat), total(job * 1000003 + number) FROM pending"
            " WHERE worker IS NOT NULL GROUP BY worker"
        )
        return {worker: (beats, places) for worker, beats, places in rows}

    def release_workers(self, workers: Iterable[str]) -> int:
        """Gives back what workers that do not live have taken; returns how many files."""
        with self._database.transaction():
            return sum(
                self._database.execute("UPDATE pending SET worker = NULL WHERE worker = ?", worker)
                for worker in workers
            )

    def release(self, worker: str, claims: Iterable[Claim], *, is_attempt: bool = False) -> None:
        """Gives back what a worker does not go on with, as an attempt or as none."""
        with self._database.transaction():
            for claim in claims:
                self._database.execute(
                    "UPDATE pending SET worker = NULL, attempts = attempts - ?"
                    " WHERE job = ? AND number = ? AND worker = ?",
                    *(0 if is_attempt else 1, *claim.place, worker),
                )

    def read_upload(self, claim: Claim) -> bytes | None:
        """An upload; None if it is not there, as after the job was deleted."""
        query = "SELECT data FROM uploads WHERE job = ? AND number = ?"
        data: bytes | None = self._database.value(query, *claim.place)
        return data

    def finish(self, worker: str, claim: Claim, result: FileResult) -> bool:
        """Stores what became of a file.

        Returns:
            False if the worker has it no more: the job was deleted, or another worker has it.
        """
        database = self._database
        with database.transaction():
            if not self._remove(worker, claim):
                return False
            key = f"{claim.number:08d}"
            size = database.put_entry(
                claim.job, key, result.served, result.properties, result.instances
            )
            query = "SELECT length(data) FROM uploads WHERE job = ? AND number = ?"
            size -= database.value(query, *claim.place) or 0
            database.execute("DELETE FROM uploads WHERE job = ? AND number = ?", *claim.place)
            served = orjson.loads(
                database.value("SELECT served FROM jobs WHERE seq = ?", claim.seq)
            )
            if not result.failed:
                served[result.served] = served.get(result.served, 0) + 1
            column = "failed" if result.failed else "done"
            database.execute(
                f"UPDATE jobs SET {column} = {column} + 1, bytes = bytes + ?, served = ?"
                " WHERE seq = ?",
                *(size, orjson.dumps(served), claim.seq),
            )
            self._end(claim)
        return True

    def _end(self, claim: Claim) -> None:
        """Ends a job whose files are all finished."""
        ended = self._database.execute(
            "UPDATE jobs SET finished_s = ?, webhook_state = ?"
            " WHERE seq = ? AND done + failed = files AND finished_s IS NULL",
            *(self._clock(), "waiting" if claim.options.webhook else "", claim.seq),
        )
        if ended and claim.options.webhook:
            self._database.execute(
                "INSERT INTO pending (job, number, name) VALUES (?, ?, '')", claim.seq, WEBHOOK
            )

    def _remove(self, worker: str, claim: Claim) -> bool:
        statement = "DELETE FROM pending WHERE job = ? AND number = ? AND worker = ?"
        return self._database.execute(statement, *claim.place, worker) == 1

    def note_webhook(self, worker: str, claim: Claim, error: str | None, *, last: bool) -> bool:
        """Stores an attempt to deliver a webhook.

        Args:
            worker: Who tried.
            claim: The webhook.
            error: Why it failed; None if it was delivered.
            last: Whether there are no more attempts.

        Returns:
            Whether the worker still has it.
        """
        state = "delivered" if error is None else "failed" if last else "waiting"
        with self._database.transaction():
            if not self._database.value(
                "SELECT 1 FROM pending WHERE job = ? AND number = ? AND worker = ?",
                *(*claim.place, worker),
            ):
                return False
            if state != "waiting":
                self._remove(worker, claim)
            self._database.execute(
                "UPDATE jobs SET webhook_state = ?, webhook_attempts = webhook_attempts + 1,"
                " webhook_error = ? WHERE seq = ?",
                *(state, error or "", claim.seq),
            )
        return True

    # --- the whole store ------------------------------------------------------------------------

    def count_bytes(self) -> int:
        """Bytes of all uploads and results."""
        return int(self._database.value("SELECT sum(bytes) FROM jobs") or 0)

    def count_open(self) -> tuple[int, int]:
        """Unfinished jobs, and their unfinished files."""
        query = (
            "SELECT count(*), coalesce(sum(files - done - failed), 0) FROM jobs"
            " WHERE finished_s IS NULL"
        )
        ((jobs, files),) = self._database.rows(query)
        return int(jobs), int(files)

    def list_finished(self) -> list[JobRecord]:
        """The jobs that are done and have no webhook to deliver, the earliest first."""
        where = "finished_s IS NOT NULL AND webhook_state != 'waiting' ORDER BY seq"
        return self._read(where)

    def vacuum(self) -> None:
        """Gives pages of deleted jobs back to the file system, some at a time."""
        self._database.rows(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")

    def _read(self, where: str, *parameters: object) -> list[JobRecord]:
        rows = self._database.rows(f"SELECT {_COLUMNS} FROM jobs WHERE {where}", *parameters)
        return [_build_record(dict(zip(_NAMES, row, strict=True))) for row in rows]


def _build_record(row: dict[str, Any]) -> JobRecord:
    options = JobOptions(**orjson.loads(row.pop("options")))
    served = orjson.loads(row.pop("served"))
    return JobRecord(options=options, served=served, **row)
