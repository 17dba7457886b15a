"""Steps of a measurement on a machine that is lent for minutes: child processes with time limits.

Each result is on the disk before the next step begins. A later run in the same folder goes on with
the steps that have no result yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.process import ChildProcess, kill_processes

OK, FAILED, TIMED_OUT, NOT_RUN = "ok", "failed", "timed out", "not run"
GRACE_S = 3.0
"""How long a step may take to end once its time is over."""
TAIL_BYTES = 1500
LOG_BYTES = 2_000_000
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command with a result.

    Attributes:
        name: Unique; also that of its files.
        command: Its words; `{out}` is replaced by the file of JSON, an object, that it must write.
        limit_s: Its longest time; then it and all that it started are ended.
        needs: Steps that must have succeeded.
        background: Whether the next steps begin before it has ended.
        obstacle: Why it cannot run here; None if it can.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    needs: Sequence[str] = ()
    background: bool = False
    obstacle: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step.

    Attributes:
        step: Its name.
        status: `OK`, `FAILED`, `TIMED_OUT` or `NOT_RUN`; the last is not recorded.
        seconds: How long it ran.
        reason: Why it did not succeed, with the end of its output.
        data: What it wrote.
    """

    step: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    data: dict[str, Any] | None = None


class Journal:
    """Outcomes, a line of JSON each; one is on the disk when `append` returns.

    Args:
        path: The file; what is no outcome in it, such as a line cut short, is ignored.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def read(self) -> dict[str, Outcome]:
        """The last outcome of each step."""
        found = {}
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        for line in lines:
            try:
                outcome = Outcome(**json.loads(line))
            except (ValueError, TypeError):
                continue
            found[outcome.step] = outcome
        return found

    def append(self, outcome: Outcome) -> None:
        """Adds an outcome, on a line of its own whatever the file ends with."""
        line = json.dumps(vars(outcome)).encode() + b"\n"
        with self._lock, self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


class _Interrupted(Exception):
    """All steps are to end; this one has no outcome."""


class StepRunner:
    """Runs steps one after another.

    Args:
        folder: For `results.jsonl`, `logs/` and what the steps write; made if it is missing.
        seconds: No step runs longer than this after now.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self._folder = folder.resolve()
        self._logs, self._outputs = self._folder / "logs", self._folder / "outputs"
        for made in (self._logs, self._outputs):
            made.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self._folder / "results.jsonl")
        self._end_s = time.monotonic() + seconds
        self._stopping = threading.Event()
        self._mark = hashlib.sha256(str(self._folder).encode()).hexdigest()[:16]

    def run(self, steps: Sequence[Step], *, retry: bool = False) -> list[Outcome]:
        """Runs the steps that have no recorded outcome; on SIGTERM all are ended.

        Args:
            steps: In the order in which they begin; `needs` come before.
            retry: Runs those again that have not succeeded.

        Returns:
            An outcome for each step.
        """
        found = {
            name: outcome
            for name, outcome in self._journal.read().items()
            if outcome.status == OK or not retry
        }
        for step in steps:  # of a run that was killed
            if step.name not in found:
                kill_processes(self._mark_of(step))
        waiting: dict[str, Future[Outcome]] = {}
        with _exit_on_sigterm(), ThreadPoolExecutor(max(1, len(steps))) as pool:
            try:
                for step in steps:
                    if step.name in found:
                        continue
                    for name in step.needs:
                        if name in waiting:
                            found[name] = waiting.pop(name).result()
                    begun = pool.submit(self._run, step, found)
                    if step.background:
                        waiting[step.name] = begun
                    else:
                        found[step.name] = begun.result()
                found |= {name: begun.result() for name, begun in waiting.items()}
            finally:
                self._stopping.set()
        return [found[step.name] for step in steps]

    def pack_logs(self) -> Path:
        """One archive of all logs, of each the last `LOG_BYTES` at most."""
        archive = self._folder / "logs.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for log in sorted(self._logs.glob("*.log")):
                cut = self._logs / f"{log.stem}.tail"
                cut.write_bytes(_read_end(log, LOG_BYTES))
                tar.add(cut, log.name)
                cut.unlink()
        return archive

    def _run(self, step: Step, found: dict[str, Outcome]) -> Outcome:
        """Runs a step, records its outcome and returns it; what is not begun is not recorded."""
        missing = [n for n in step.needs if n not in found or found[n].status != OK]
        limit_s = min(step.limit_s, self._end_s - time.monotonic())
        reason = step.obstacle
        if reason is None and missing:
            reason = f"{', '.join(missing)} has no result"
        if reason is None and limit_s <= 0:
            reason = "the time is over"
        if reason is not None:
            return Outcome(step=step.name, status=NOT_RUN, reason=reason)
        try:
            outcome = self._attempt(step, limit_s)
        except _Interrupted:
            return Outcome(step=step.name, status=NOT_RUN, reason="interrupted")
        self._journal.append(outcome)
        return outcome

    def _attempt(self, step: Step, limit_s: float) -> Outcome:
        log, out = self._logs / f"{step.name}.log", self._outputs / f"{step.name}.json"
        out.unlink(missing_ok=True)
        words = [word.replace("{out}", str(out)) for word in step.command]
        began_s = time.monotonic()
        try:
            with ChildProcess(words, log=log, mark=self._mark_of(step), stop_s=GRACE_S) as process:
                status = self._wait(process, began_s + limit_s)
                seconds = round(time.monotonic() - began_s, 2)
        except OSError as error:
            return Outcome(step=step.name, status=FAILED, reason=str(error))
        data, fault = _read_result(out)
        if status is None:
            how, fault = TIMED_OUT, f"no end after {limit_s:.0f} s"
        elif status != 0:
            how, fault = FAILED, f"exit status {status}"
        else:
            how = FAILED if fault else OK
        end = _read_end(log, TAIL_BYTES).decode(errors="replace").strip()
        reason = f"{fault}: {end}" if fault else ""
        return Outcome(step=step.name, status=how, seconds=seconds, reason=reason, data=data)

    def _wait(self, process: ChildProcess, deadline_s: float) -> int | None:
        """Exit status; None once the time is over."""
        while True:
            status = process.wait(_POLL_S)
            if status is not None or time.monotonic() > deadline_s:
                return status
            if self._stopping.is_set():
                raise _Interrupted

    def _mark_of(self, step: Step) -> str:
        return f"{self._mark}.{step.name}"


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the main thread by SystemExit, so that its contexts are left."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read_result(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A step's object, or why there is none."""
    if not path.exists():
        return None, "it wrote no result"
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        return None, f"its result is no JSON ({error})"
    return (data, "") if isinstance(data, dict) else (None, "its result is no JSON object")


def _read_end(path: Path, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(-min(file.tell(), size_bytes), os.SEEK_END)
        return file.read()
