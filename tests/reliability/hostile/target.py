"""The server under attack, and what must be as before after each attack."""

from __future__ import annotations

import http.client
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.hostile.health import Health, HealthWatcher
from tests.reliability.hostile.wire import Wire
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.memory import read_resident_bytes
from tests.support.server import CPU_FLAGS, ServerProcess
from tests.support.waiting import poll_until

TARGETS = ("process", "workers", "admin")
"""One process, two worker processes, and the admin port of one process."""
TIMEOUT_S = 0.6
MAX_BODY_BYTES = 2_000_000
MAX_BODIES_BYTES = 8_000_000
MAX_CONNECTIONS = 60
LIMITS = {
    "SOLO_HEAD_TIMEOUT_S": str(TIMEOUT_S),
    "SOLO_BODY_TIMEOUT_S": str(TIMEOUT_S),
    "SOLO_BODY_TOTAL_S": str(3 * TIMEOUT_S),
    "SOLO_WRITE_TIMEOUT_S": str(TIMEOUT_S),
    "SOLO_KEEP_ALIVE_S": str(2 * TIMEOUT_S),
    "SOLO_MIN_RATE": "1000",
    "SOLO_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
    "SOLO_MAX_BODIES_BYTES": str(MAX_BODIES_BYTES),
    "SOLO_MAX_CONNECTIONS": str(MAX_CONNECTIONS),
}
BODY_BYTES = "solo_request_body_bytes"
PICTURE = encode_picture(draw_picture())
_SETTLE_S = 15.0
_MEMORY_SLACK = 4_000_000
"""Bytes; an allocator does not give back everything at once."""


@dataclass(frozen=True)
class Target:
    """A running server.

    Attributes:
        name: One of `TARGETS`.
        server: The process.
        port: Of the attacks.
        main_port: That serves /segment.
        post_path: A path of `port` that reads a body and answers 200 to `good_body`.
        good_body: See `post_path`.
        good_bytes: Bytes of a body that `post_path` does not refuse for its length.
    """

    name: str
    server: ServerProcess
    port: int
    main_port: int
    post_path: str
    good_body: bytes
    good_bytes: int

    def connect(self, receive_buffer: int | None = None) -> Wire:
        """A connection to the attacked port."""
        return Wire(self.port, receive_buffer)

    def build_head(self, *headers: str, path: str = "", method: str = "POST") -> bytes:
        """Request line, Host and more headers, without the empty line."""
        path = path or self.post_path
        kind = "Content-Type: application/json" if self.name == "admin" else "X-Content: image"
        lines = [f"{method} {path} HTTP/1.1", "Host: x", kind, *headers, ""]
        return "\r\n".join(lines).encode()

    def build_post(self, body: bytes, *headers: str, length: int | None = None) -> bytes:
        """A whole request; `length` announces another length."""
        announced = f"Content-Length: {len(body) if length is None else length}"
        return self.build_head(announced, *headers) + b"\r\n" + body

    def read_metric(self, name: str) -> float:
        """The sum of a metric over the processes."""
        port = self.port if self.name == "admin" else self.main_port
        text = ask(port, "GET", "/metrics")[1].decode()
        pattern = rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$"
        return sum(map(float, re.findall(pattern, text, re.MULTILINE)))

    def find_pids(self) -> list[int]:
        """The server's process and its children."""
        parent = self.server.process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
        return [parent, *map(int, children.split())]

    def count_descriptors(self) -> int:
        """Open files of all processes."""
        return self.list_descriptors().total()

    def list_descriptors(self) -> Counter[tuple[int, str]]:
        """How many files of each kind or path each process has open."""
        opened: Counter[tuple[int, str]] = Counter()
        for pid in self.find_pids():
            folder = Path(f"/proc/{pid}/fd")
            for descriptor in os.listdir(folder):
                with suppress(FileNotFoundError):  # it has been closed meanwhile
                    opened[pid, re.sub(r":\[\d+\]", "", os.readlink(folder / descriptor))] += 1
        return opened

    def read_memory(self) -> int:
        """Resident bytes of all processes."""
        return sum(map(read_resident_bytes, self.find_pids()))

    def endure(self, attack: Callable[[Target], None], watcher: HealthWatcher) -> Health:
        """Runs an attack; checks that nothing of it remains, and that health was answered."""
        memory, logged = self.read_memory(), len(self.server.read_log())
        descriptors = self.list_descriptors()
        watcher.start()
        try:
            attack(self)
        finally:
            health = watcher.stop()
        assert ask(self.main_port, "POST", "/segment", PICTURE)[0] == 200
        poll_until(
            lambda: self.count_descriptors() <= descriptors.total(),
            timeout_s=_SETTLE_S,
            pause_s=0.05,
            describe=lambda: (
                f"opened {self.list_descriptors() - descriptors}, "
                f"closed {descriptors - self.list_descriptors()}, "
                f"log: {self.server.read_log()[logged:]}"
            ),
        )
        most = 1.05 * memory + _MEMORY_SLACK
        poll_until(
            lambda: self.read_memory() <= most,
            timeout_s=_SETTLE_S,
            pause_s=0.05,
            describe=lambda: f"{self.read_memory():,} bytes are resident, {memory:,} were before",
        )
        log = self.server.read_log()[logged:]
        assert " ERROR " not in log, log
        assert "Traceback" not in log, log
        assert self.read_metric(BODY_BYTES) == 0
        assert health.failures == []
        assert health.slowest_s < 3  # 0.05 is the aim on an idle machine
        return health


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One request on a connection of its own; status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Connection": "close"}
    if body is not None and body.startswith(b"{"):
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def build_flags(name: str, repo: Path) -> tuple[str, ...]:
    """The command line of a target."""
    more = {
        "process": (),
        "workers": ("--workers", "2"),
        "admin": ("--admin-port", "0"),
    }[name]
    return ("--model-repo", str(repo), *CPU_FLAGS, *more)


def find_target(name: str, server: ServerProcess) -> Target:
    """The target of a server that is ready and has warmed up."""
    main_port = int(server.url.rpartition(":")[2])
    port, path, body, count = main_port, "/segment", PICTURE, 300_000
    if name == "admin":
        (port,) = map(int, re.findall(r"admin endpoints on http://\S+:(\d+)", server.read_log()))
        path, body, count = "/v2/repository/index", b"{}", 3_000
    target = Target(name, server, port, main_port, path, body, count)
    processes = 2 if name == "workers" else 1  # the server is ready as soon as one of them is
    poll_until(lambda: target.read_metric("solo_ready") == processes, timeout_s=60, pause_s=0.05)
    with ExitStack() as stack:  # several at once, so that each worker process has had connections
        wires = [stack.enter_context(target.connect()) for _ in range(8)]
        for wire in wires:
            wire.send(target.build_post(body))
        for wire in wires:
            wire.expect_status(200)
    for _ in range(30):
        assert ask(main_port, "POST", "/segment", PICTURE)[0] == 200
        assert ask(port, "POST", path, body)[0] == 200
        target.read_metric("solo_ready")
    return target
