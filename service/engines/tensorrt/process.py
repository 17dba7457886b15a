"""Builds one TensorRT engine in a process of its own, as a `BuildJob` of `switching`.

    python -m service.engines.tensorrt.process    the job on stdin, progress on stdout

The job is a line of JSON, {"cache", "options", "graph_bytes"}, and then the graph.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO

from service.engines.base import BackendError
from service.engines.tensorrt.build import obtain_engine
from service.engines.tensorrt.cache import BuildOptions, EngineCache
from service.models.builder import BuildJob

NICENESS = 10
REPORT_S = 0.2
"""Least time between two reports of progress."""


def build_job(graph: bytes, options: BuildOptions, cache: Path) -> BuildJob:
    """The job that puts a graph's engine into a cache."""
    content = {
        "cache": str(cache),
        "options": options.model_dump(mode="json"),
        "graph_bytes": len(graph),
    }
    command = (sys.executable, "-m", "service.engines.tensorrt.process")
    return BuildJob(command, json.dumps(content).encode() + b"\n" + graph)


class Reporter:
    """Writes progress as lines of JSON, not more often than anyone reads."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._next_s = 0.0

    def __call__(self, status: str, progress: float) -> None:
        """What the build is at, and how far."""
        now_s = time.monotonic()
        with self._lock:
            if now_s < self._next_s and progress < 1:
                return
            self._next_s = now_s + REPORT_S
        self.write({"status": status, "progress": round(progress, 4)})

    def write(self, message: dict[str, object]) -> None:
        """Writes one line."""
        with self._lock:
            self._stream.write(json.dumps(message).encode() + b"\n")
            self._stream.flush()


def _take_stdout() -> IO[bytes]:
    """Standard output for this module alone: what libraries print goes to stderr."""
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return own


def _end_with_parent() -> None:
    """Ends this process, TensorRT's threads included, when stdin ends."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main() -> int:
    """Runs one job; returns the exit status."""
    reporter = Reporter(_take_stdout())
    job = json.loads(sys.stdin.buffer.readline())
    graph = sys.stdin.buffer.read(job["graph_bytes"])
    _end_with_parent()
    os.nice(NICENESS)
    try:
        options = BuildOptions.model_validate(job["options"])
        engine = obtain_engine(graph, options, EngineCache(Path(job["cache"])), reporter)
    except BackendError as error:
        reporter.write({"error": str(error)})
        return 1
    if not engine.stored:
        reporter.write({"error": engine.origin})
        return 1
    reporter.write({"done": True})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
