"""Runs the real server as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.processes import free_port
from tests.support.ray_nodes import SETTINGS as RAY_SETTINGS

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
RAY_START_S = 400.0
CPU_FLAGS = ("--device", "cpu", "--threads", "1", "--pool-threads", "2")


class ServerProcess:
    """`python -m service` on a port of its own, of the checkout at `root`.

    With `on_ray` it is `python -m service ray`; that starts many processes and takes its time.
    `module` stands in for `service`, `prepare` is called in the new process before it starts.

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
        on_ray: bool = False,
        module: str = "service",
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.log = log
        self._start_s = RAY_START_S if on_ray else START_S
        command = ["ray", "--port", str(free_port())] if on_ray else ["--port", "0"]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *command, *arguments],
                cwd=root,
                env={**os.environ, **(RAY_SETTINGS if on_ray else {}), **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=prepare,
            )
        self.url = ""

    def read_log(self) -> str:
        """What the server has written so far."""
        return self.log.read_text(encoding="utf-8")

    def wait_until_ready(self) -> None:
        """Waits for the address in the log and for readiness."""
        deadline_s = time.monotonic() + self._start_s
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"exit {self.process.returncode}: {self.read_log()}")
            _, found, rest = self.read_log().partition("running on ")
            if found and "\n" in rest:
                self.url = rest.split()[0]
                if self._is_ready():
                    return
            time.sleep(0.05)
        raise RuntimeError(f"not ready after {self._start_s} s: {self.read_log()}")

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
    on_ray: bool = False,
    module: str = "service",
    prepare: Callable[[], None] | None = None,
) -> Iterator[ServerProcess]:
    """A server that is ready; it is killed at the end if it still runs.

    One on Ray is told to end first: its processes could outlive it.
    """
    server = ServerProcess(
        log,
        *arguments,
        environment=environment,
        root=root,
        on_ray=on_ray,
        module=module,
        prepare=prepare,
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        if server.process.poll() is None and on_ray:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait()
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
