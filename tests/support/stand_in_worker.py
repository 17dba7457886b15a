"""A worker process that serves nothing; it starts faster than the server."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from service.scale.workers.channel import Order, State, WorkerEnd

FAILS, STOPS, STAYS, BREAKS = "fails", "stops", "stays", "breaks"
"""Names of files that change what a stand-in does, followed by its number where it needs one."""


def stand_in(folder: Path, settings: Any, index: int, channel: socket.socket) -> None:
    """A worker that tells each client who it is, and counts the connections it keeps."""
    if (folder / FAILS).exists():
        sys.exit(3)
    channel.setblocking(False)
    end = WorkerEnd(channel)
    kept: list[socket.socket] = []
    while True:
        if (folder / f"{STOPS}{index}").exists():
            (folder / f"{STOPS}{index}").unlink()
            os.kill(os.getpid(), signal.SIGSTOP)
        is_broken = (folder / f"{BREAKS}{index}").exists()
        end.report(len(kept), State.FAILED if is_broken else State.SERVES)
        select.select([channel], [], [], 0.02)
        for message in end.receive():
            if message.kind is Order.SIGNAL:
                (folder / f"{index}.signal").write_text(str(message.number))
                if message.number == signal.SIGTERM and not (folder / STAYS).exists():
                    sys.exit(0)
            elif message.connection is not None:
                kept.append(message.connection)
                message.connection.sendall(b"%d %d" % (index, os.getpid()))
