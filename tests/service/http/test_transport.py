from __future__ import annotations

import asyncio

from service.http.transport import RESPONSE_START, GuardedTransport


class Memory(asyncio.Transport):
    """Keeps what is written; the system takes `taken` bytes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""
        self.taken = 0
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.data += data

    def write_eof(self) -> None:
        self.data += b"<end>"

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return len(self.data) - self.taken


def build() -> tuple[Memory, GuardedTransport, list[str]]:
    memory, closed = Memory(), list[str]()
    return memory, GuardedTransport(memory, lambda: closed.append("closed")), closed


def test_what_was_sent_ahead_is_not_sent_again() -> None:
    for count in range(len(RESPONSE_START) + 1):
        memory, transport, _ = build()
        assert all(transport.send_ahead() for _ in range(count))
        transport.write(b"HTTP/1.1 200 OK\r\n")
        transport.write(b"more")
        assert memory.data == b"HTTP/1.1 200 OK\r\nmore"
        assert transport.written == len(memory.data)


def test_no_more_than_the_start_is_sent_ahead() -> None:
    memory, transport, _ = build()
    for _ in RESPONSE_START:
        assert transport.send_ahead()
    assert not transport.send_ahead()
    assert memory.data == RESPONSE_START


def test_taken_are_the_bytes_that_left_the_buffer() -> None:
    memory, transport, _ = build()
    transport.write(b"abcde")
    memory.taken = 3
    assert (transport.written, transport.taken) == (5, 3)


def test_closing_is_left_to_the_guard_and_nothing_is_written_after_it() -> None:
    memory, transport, closed = build()
    transport.close()
    assert (closed, transport.is_closing()) == (["closed"], False)
    transport.write_eof()
    transport.write(b"late")
    assert not transport.send_ahead()
    assert (memory.data, transport.is_closing()) == (b"<end>", True)
    other, transport, _ = build()
    other.is_closed = True
    transport.write(b"late")
    assert other.data == b""
