from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from service.http import accept
from service.http.accept import Accepter


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=500) as opened:
        opened.setblocking(False)
        yield opened


@contextmanager
def limit_descriptors(free: int) -> Iterator[None]:
    """So many descriptors can still be opened; there must be no gaps between those in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(listener: socket.socket, count: int, stack: ExitStack) -> list[socket.socket]:
    address = listener.getsockname()
    return [stack.enter_context(socket.create_connection(address, 10)) for _ in range(count)]


def is_refused(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_waiting_connections_are_accepted_in_bounded_numbers(listener: socket.socket) -> None:
    accepter = Accepter(listener)
    with ExitStack() as stack:
        assert list(accepter.accept()) == []
        connect(listener, accept._MOST_AT_ONCE + 3, stack)
        first = [stack.enter_context(c) for c in accepter.accept()]
        rest = [stack.enter_context(c) for c in accepter.accept()]
        assert (len(first), len(rest)) == (accept._MOST_AT_ONCE, 3)
    accepter.close()


def test_without_descriptors_what_waits_is_refused_and_later_connections_are_served(
    listener: socket.socket,
) -> None:
    accepter = Accepter(listener)
    with ExitStack() as stack:
        clients = connect(listener, 5, stack)
        accepted = []
        with limit_descriptors(free=2), pytest.raises(OSError) as raised:
            for connection in accepter.accept():
                accepted.append(stack.enter_context(connection))
        with limit_descriptors(free=0):
            accepter.refuse()
        assert raised.value.errno == errno.EMFILE
        assert len(accepted) == 2
        for connection in accepted:
            connection.sendall(b"x")
        assert [is_refused(client) for client in clients] == [False] * 2 + [True] * 3
        (late,) = connect(listener, 1, stack)
        (served,) = accepter.accept()
        served.close()
        late.close()
    accepter.close()


def test_a_spare_descriptor_that_is_lost_is_opened_again_when_there_is_one(
    listener: socket.socket,
) -> None:
    with limit_descriptors(free=0):
        accepter = Accepter(listener)
    with ExitStack() as stack:
        connect(listener, 1, stack)
        with limit_descriptors(free=0), pytest.raises(OSError):
            list(accepter.accept())
        with limit_descriptors(free=0):
            accepter.refuse()  # there is nothing to do it with
        (served,) = accepter.accept()
        served.close()
        (late,) = connect(listener, 1, stack)
        with limit_descriptors(free=0), pytest.raises(OSError):
            list(accepter.accept())
        with limit_descriptors(free=0):
            accepter.refuse()
        assert is_refused(late)
    accepter.close()
    accepter.close()


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EINTR])
def test_a_client_that_is_gone_does_not_keep_others_waiting(
    listener: socket.socket, number: int
) -> None:
    class Failing:
        def __init__(self) -> None:
            self.fails = True

        def accept(self) -> tuple[socket.socket, object]:
            if self.fails:
                self.fails = False
                raise OSError(number, "gone")
            return listener.accept()

    accepter = Accepter(Failing())  # type: ignore[arg-type]
    with ExitStack() as stack:
        connect(listener, 1, stack)
        (connection,) = accepter.accept()
        connection.close()
    accepter.close()
