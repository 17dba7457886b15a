"""Runs the real server as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
CPU_FLAGS = ("--device", "cpu", "--threads", "1", "--pool-threads", "2")


class ServerProcess:
    """`python -m service` on a port of its own, of the checkout at `root`.

    Attributes:
        process: The process.
        url: Its address.
        log: File with its output.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        root: Path = ROOT,
    ) -> None:
        self.log = log
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service", "--port", "0", *arguments],
                cwd=root,
                env={**os.environ, **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.url = ""

    def read_log(self) -> str:
        """What the server has written so far."""
        return self.log.read_text(encoding="utf-8")

    def wait_until_ready(self) -> None:
        """Waits for the address in the log and for readiness."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"exit {self.process.returncode}: {self.read_log()}")
            _, found, rest = self.read_log().partition("running on ")
            if found and " " in rest:
                self.url = rest.split()[0]
                if self._is_ready():
                    return
            time.sleep(0.05)
        raise RuntimeError(f"not ready after {START_S} s: {self.read_log()}")

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def terminate(self) -> None:
        """Sends SIGTERM and returns at once."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit status."""
        return self.process.wait(timeout_s)


@contextmanager
def run_server(
    log: Path,
    *arguments: str,
    environment: dict[str, str] | None = None,
    root: Path = ROOT,
) -> Iterator[ServerProcess]:
    """A server that is ready; it is killed at the end if it still runs."""
    server = ServerProcess(log, *arguments, environment=environment, root=root)
    try:
        server.wait_until_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
