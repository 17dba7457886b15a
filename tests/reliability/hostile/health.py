"""Asks a server for health while it is attacked, in a process of its own.

In the process of the attack it would wait for the attack's Python.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from types import TracebackType

_REQUEST = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
_PAUSE_S = 0.01
_TIMEOUT_S = 30.0


@dataclass
class Health:
    """What one watch has seen.

    Attributes:
        failures: What was not 200.
        seconds: Times of the others.
    """

    failures: list[str]
    seconds: list[float]

    @property
    def slowest_s(self) -> float:
        """The 99th percentile."""
        return sorted(self.seconds)[int(0.99 * len(self.seconds))] if self.seconds else 0.0


class HealthWatcher:
    """A process that asks for health on a new connection, again and again, when told to.

    Args:
        port: The server's.
    """

    def __init__(self, port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> HealthWatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._process.communicate()

    def start(self) -> None:
        """Returns after the first answer."""
        self._tell()

    def stop(self) -> Health:
        """What was seen since `start`."""
        return Health(**json.loads(self._tell()))

    def _tell(self) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def main() -> None:
    """A line starts a watch, the next one ends it; both are answered with a line."""
    port = int(sys.argv[1])
    while sys.stdin.readline():
        health = Health([], [])
        _ask(port, health)
        print(flush=True)
        while not select.select([sys.stdin], [], [], _PAUSE_S)[0]:
            _ask(port, health)
        sys.stdin.readline()
        print(json.dumps(vars(health)), flush=True)


def _ask(port: int, health: Health) -> None:
    began_s = time.monotonic()
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", port), _TIMEOUT_S) as connection:
            connection.sendall(_REQUEST)
            while data := connection.recv(65_536):
                answer += data
    except OSError as error:
        health.failures.append(repr(error))
        return
    health.seconds.append(time.monotonic() - began_s)
    if not answer.startswith(b"HTTP/1.1 200 "):
        health.failures.append(repr(answer[:100]))


if __name__ == "__main__":
    main()
