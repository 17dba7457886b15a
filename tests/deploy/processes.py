"""Real processes for the tests of this folder: started, awaited, ended."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Running:
    """A process that answers HTTP on this host."""

    port: int
    log: Path

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get_json(self, path: str, **query: str) -> Any:
        status, body = self.request("GET", f"{path}?{urlencode(query)}" if query else path)
        assert status == 200, (path, query, status, body[:500])
        return json.loads(body)


@contextmanager
def running(
    command: list[str], port: int, ready_path: str, folder: Path, env: dict[str, str] | None = None
) -> Iterator[Running]:
    """Starts a command, waits until `ready_path` answers 200, and ends it afterwards."""
    log = folder / f"{Path(command[0]).name}-{port}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=env)
        try:
            here = Running(port, log)
            _await_ready(here, process, ready_path)
            yield here
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_ready(here: Running, process: subprocess.Popen[bytes], path: str) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode}: {here.log.read_text()[-2000:]}")
        try:
            if here.request("GET", path)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{path} did not answer 200: {here.log.read_text()[-2000:]}")


@contextmanager
def running_server(model_repo: Path, folder: Path) -> Iterator[Running]:
    """The real server as a process, on a port of its own."""
    port = free_port()
    command = [sys.executable, "-m", "service", "--model-repo", str(model_repo)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "SOLO_THREADS": "1"}
    with running(command, port, "/v2/health/ready", folder, env) as here:
        yield here
