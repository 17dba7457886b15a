"""A server on a loopback port that answers with what a test gives it, byte by byte."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

Part = bytes | float
"""Bytes to send, or seconds to wait."""


def line(**content: Any) -> bytes:
    """A line of a streamed answer."""
    return json.dumps(content).encode() + b"\n"


def progress(done: int, total: int, elapsed_s: float) -> bytes:
    """A progress line."""
    return line(progress={"canvases_done": done, "canvases": total, "elapsed_s": elapsed_s})


def stream(*parts: Part, whole: bool = True) -> list[Part]:
    """A chunked answer of JSON lines; if not `whole`, the connection ends in the middle."""
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n"
        b"transfer-encoding: chunked\r\nx-request-id: r7\r\n\r\n"
    )
    chunks = [
        b"%x\r\n%s\r\n" % (len(part), part) if isinstance(part, bytes) else part for part in parts
    ]
    return [head, *chunks, b"0\r\n\r\n" if whole else b"3f\r\nhalf"]


class FakeServer:
    """Answers each request with the next step of a script; a step is the parts of an answer.

    Attributes:
        url: Its address.
        heads: Request line and headers of each request.
        connections: How many were opened.
        left: Set when a client closes its connection before the answer is complete.
    """

    def __init__(self, *steps: Sequence[Part]) -> None:
        self._steps = list(steps)
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.heads: list[str] = []
        self.connections = 0
        self.left = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as received:
            while head := self._read_head(received):
                with self._lock:
                    self.heads.append(head)
                    step = self._steps.pop(0)
                if not self._answer(connection, step):
                    return

    @staticmethod
    def _read_head(received: Any) -> str:
        """The request's head, after its body was read; "" at the end of the connection."""
        head, size = "", 0
        while (header := received.readline().decode()).strip():
            head += header.replace("\r\n", "\n")
            if header.lower().startswith("content-length:"):
                size = int(header.partition(":")[2])
        if head:
            received.read(size)
        return head

    def _answer(self, connection: socket.socket, step: Sequence[Part]) -> bool:
        """Sends an answer; whether the connection can be used again."""
        for part in step:
            if isinstance(part, bytes):
                connection.sendall(part)
                continue
            connection.settimeout(part)
            try:
                connection.recv(1)  # nothing comes but the end of the connection
            except TimeoutError:
                connection.settimeout(None)
                continue
            except ConnectionResetError:
                pass
            self.left.set()
            return False
        return step[-1] == b"0\r\n\r\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        if kind is None:
            assert self._steps == [], "the client sent fewer requests than expected"
