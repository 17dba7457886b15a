"""A process that answers each line with a line of JSON: one side of a comparison.

Each side has a process of its own, so that neither warms the other's caches nor fills its memory.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """The process; leaving the context ends it.

    Args:
        command: What is run, in the repository's root.
        environment: Added to this process's.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = command
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line and waits for the answer.

        Raises:
            RuntimeError: The process ended without one.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        for answer in self._process.stdout:
            if answer.startswith("{"):  # mmdetection prints other lines too
                report: dict[str, Any] = json.loads(answer)
                return report
        raise RuntimeError(f"{' '.join(self._command)} ended early, see above")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
