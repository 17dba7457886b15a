"""TensorRT's messages, and the progress of a build. NOT RUN ON HARDWARE, see `build`."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

from service.engines.builder import Report

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

KEPT_ERRORS = 5


class Messages:
    """The last errors that TensorRT logged; its calls return only None."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=KEPT_ERRORS)

    def add(self, text: str) -> None:
        """Keeps an error."""
        self._errors.append(text)

    def explain(self) -> str:
        """The errors since the last call, oldest first."""
        found = "; ".join(self._errors)
        self._errors.clear()
        return found or "it gives no reason"


def build_logger(messages: Messages) -> trt.ILogger:
    """A logger that passes messages on to `logging` and keeps errors; called from many threads."""
    import tensorrt as trt

    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            level = levels.get(severity)
            if level is None:
                return
            logger.log(level, "%s", msg)
            if level == logging.ERROR:
                messages.add(msg)

    return Log()


class PhaseProgress:
    """Progress of a build from TensorRT's nested phases; called from several of its threads."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, steps done
        self._progress = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` steps has begun within `parent`."""
        with self._lock:
            self._phases[name] = (parent, max(1, steps), 0)

    def step(self, name: str, step: int) -> None:
        """Step number `step` of a phase, counted from 0, is done."""
        with self._lock:
            if name not in self._phases:
                return
            parent, steps, _ = self._phases[name]
            self._phases[name] = (parent, steps, step + 1)
            self._progress = max(self._progress, self._fraction(None))
            self._report(f"building the engine: {name}", self._progress)

    def finish(self, name: str) -> None:
        """A phase has ended, possibly before its last step."""
        with self._lock:
            self._phases.pop(name, None)

    def _fraction(self, parent: str | None) -> float:
        """Of `parent`: its furthest phase, including that phase's running step."""
        done = [
            min(1.0, (count + self._fraction(name)) / steps)
            for name, (above, steps, count) in self._phases.items()
            if above == parent
        ]
        return max(done, default=0.0)


def build_monitor(progress: PhaseProgress) -> trt.IProgressMonitor:
    """The object that TensorRT calls while it builds."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.step(phase_name, step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()
