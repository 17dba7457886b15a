"""Serves with one engine while a better one is built, then changes over between two batches.

The builder is a process of its own: what it needs of memory and of cores, and what may kill it,
does not reach the server. It gets its job on stdin, which stays open: when the server ends in
whatever way, stdin ends and so does the builder. It answers with lines of JSON on stdout:

    {"status": "building the engine", "progress": 0.4}    as often as it likes
    {"done": true}  or  {"error": "why"}                  once, at the end
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import Backend, BackendError, Precision

logger = logging.getLogger(__name__)

CLOSE_S = 30.0
"""How long `close` waits for calls that still run."""


@dataclass(frozen=True)
class BuildJob:
    """What a builder is started with.

    Attributes:
        command: Program and arguments.
        stdin: What it reads first.
    """

    command: Sequence[str]
    stdin: bytes = b""


class BuildFailed(Exception):
    """The builder has not built the engine; says why."""


@dataclass(frozen=True)
class _Answer:
    """The builder's last word; an error, or none."""

    error: str | None


@dataclass(eq=False)
class _Seat:
    """A backend and how many calls are in it."""

    backend: Backend
    busy: int = 0


class SwitchingBackend:
    """A first backend until a second is ready; a failure leaves the first and says why.

    Args:
        first: Serves from the start; closed after the change.
        job: Builds what `load` needs.
        load: Gives the second backend once the builder is done.
        warm: Runs the second once, and raises if its output is not right.
        concurrency: How many calls the second backend will take at once.

    Attributes:
        status: What goes on, a few words: "waiting", what the builder says, "loading", "switched",
            "failed" or "closed".
        progress: 0..1 of the build.
    """

    def __init__(
        self,
        first: Backend,
        job: BuildJob,
        load: Callable[[], Backend],
        warm: Callable[[Backend], None],
        concurrency: int = 1,
    ) -> None:
        self.concurrency = max(first.concurrency, concurrency)
        self.status = "waiting"
        self.progress = 0.0
        self._adopt(first, f"{first.reason}; a faster engine is being built")
        self._seat = _Seat(first)
        self._changed = threading.Condition()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._job, self._load, self._warm = job, load, warm
        self._thread = threading.Thread(target=self._run, name="engine-builder", daemon=True)
        self._thread.start()

    def _adopt(self, backend: Backend, reason: str) -> None:
        self.name = backend.name
        self.device = backend.device
        self.precision: Precision = backend.precision
        self.reason = reason

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """See `Backend.infer`; one backend has the whole call, never both."""
        seat = self._enter()
        try:
            return seat.backend.infer(tiles)
        finally:
            with self._changed:
                seat.busy -= 1
                self._changed.notify_all()

    def _enter(self) -> _Seat:
        """Waits until the backend of the moment takes another call."""
        with self._changed:
            while not self._closed:
                if self._seat.busy < self._seat.backend.concurrency:
                    self._seat.busy += 1
                    return self._seat
                self._changed.wait()
        raise BackendError("the engine is closed")

    def close(self) -> None:
        """See `Backend.close`; ends the builder too."""
        with self._changed:
            self._closed = True
            self.status = "closed"
            if self._process is not None:
                _kill(self._process)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._seat.busy == 0, CLOSE_S)
        self._thread.join(CLOSE_S)
        self._seat.backend.close()

    def _run(self) -> None:
        """The builder's thread: build, load, warm, change over."""
        try:
            self._build()
            self._say("loading", 1.0)
            second = self._load()
        except Exception as error:  # whatever it is, the first backend goes on
            self._fail(error)
            return
        try:
            self._warm(second)
        except Exception as error:
            second.close()
            self._fail(error)
            return
        self._switch(second)

    def _say(self, status: str, progress: float) -> None:
        with self._changed:
            if not self._closed:
                self.status, self.progress = status, progress

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if self._closed:
                return
            first = self._seat.backend
            self.status = "failed"
            self.reason = f"{first.reason}; the faster engine failed: {error}"
        logger.error("%s goes on, the faster engine failed: %s", first.name, error)

    def _switch(self, second: Backend) -> None:
        """New calls go to the second; the first is closed when its last call is done."""
        with self._changed:
            if self._closed:
                unused = second
            else:
                old, self._seat = self._seat, _Seat(second)
                self._adopt(second, second.reason)
                self.status = "switched"
                self._changed.notify_all()
                self._changed.wait_for(lambda: old.busy == 0)
                unused = old.backend
                logger.info("the engine is %s now: %s", second.name, second.reason)
        try:
            unused.close()
        except Exception:  # the other one serves; a leak is all that this costs
            logger.exception("the engine %s could not be closed", unused.name)

    def _build(self) -> None:
        """Runs the builder to its end.

        Raises:
            BuildFailed: It says that it failed, or ends without a word.
        """
        with tempfile.TemporaryFile() as errors:
            process = self._start(errors)
            answer: _Answer | None = None
            # A builder that dies before it has read its job breaks the pipe; closing it too.
            with suppress(BrokenPipeError), process:
                assert process.stdin is not None and process.stdout is not None
                with suppress(BrokenPipeError):
                    process.stdin.write(self._job.stdin)
                    process.stdin.flush()
                for line in process.stdout:
                    answer = self._read(line) or answer
            if answer is not None and answer.error is not None:
                raise BuildFailed(answer.error)
            if answer is None or process.returncode != 0:
                raise BuildFailed(f"{_describe_exit(process.returncode)}{_last_line(errors)}")

    def _start(self, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with self._changed:
            if self._closed:
                raise BuildFailed("the engine is closed")
            self._process = subprocess.Popen(
                self._job.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # the server's Ctrl-C is not the builder's
            )
            return self._process

    def _read(self, line: bytes) -> _Answer | None:
        """A line of the builder: its last word, or None after progress or what is no message."""
        try:
            message = json.loads(line)
            if "error" in message:
                return _Answer(str(message["error"]))
            if message.get("done"):
                return _Answer(None)
            self._say(str(message["status"]), min(1.0, max(0.0, float(message["progress"]))))
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.debug("the engine builder printed %r", line)
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a builder that runs and all that it started; nothing it has written half counts."""
    if process.poll() is None:  # else its number may be another's by now
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _describe_exit(returncode: int) -> str:
    if returncode < 0:
        return f"the builder was ended by {signal.Signals(-returncode).name}"
    return f"the builder ended with status {returncode} and no engine"


def _last_line(errors: IO[bytes]) -> str:
    """What it wrote to stderr last, which for a Python error is the error."""
    errors.seek(0)
    lines = errors.read()[-4000:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last}" if last else ""
