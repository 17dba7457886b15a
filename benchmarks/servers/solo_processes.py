"""Ours as several processes on one port, each with its share of the cores; ended by SIGTERM."""

from __future__ import annotations

import signal
import subprocess
import sys

from benchmarks.servers.model import read_cores


def main() -> None:
    """Starts a server for each core, with the arguments of this command, and waits for them."""
    own = ("--reuse-port", "true", "--admin-port", "0", "--threads", "1", "--pool-threads", "1")
    command = [sys.executable, "-m", "service", *sys.argv[1:], *own]
    servers = [subprocess.Popen(command) for _ in range(read_cores())]

    def end(*_: object) -> None:
        for server in servers:
            server.terminate()

    signal.signal(signal.SIGTERM, end)
    for server in servers:
        server.wait()


if __name__ == "__main__":
    main()
