from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import pytest

from service.scale.workers.channel import ADMIN, MAIN, ChannelClosed, ParentEnd, WorkerEnd


@pytest.fixture
def ends() -> Iterator[tuple[ParentEnd, WorkerEnd]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ParentEnd(ours), WorkerEnd(theirs)


def test_connections_and_signals_arrive_in_their_order(ends: tuple[ParentEnd, WorkerEnd]) -> None:
    parent, worker = ends
    pairs = [socket.socketpair() for _ in range(3)]
    for number, (ours, theirs) in zip((MAIN, ADMIN, MAIN), pairs, strict=True):
        assert parent.pass_connection(number, theirs)
        theirs.close()  # the worker has it
        ours.sendall(b"%d" % number)
    parent.pass_signal(signal.SIGTERM)
    received = list(worker.receive())
    assert [number for number, _ in received] == [MAIN, ADMIN, MAIN, signal.SIGTERM]
    for number, connection in received[:3]:
        assert connection is not None
        with connection:
            assert connection.recv(10) == b"%d" % number
    assert received[3][1] is None
    assert list(worker.receive()) == []
    for ours, _ in pairs:
        ours.close()


def test_connections_are_those_reported_and_those_on_their_way(
    ends: tuple[ParentEnd, WorkerEnd],
) -> None:
    parent, worker = ends
    assert not parent.read_reports()
    with socket.socket() as connection:
        for _ in range(5):
            assert parent.pass_connection(MAIN, connection)
    assert parent.connections == 5
    for _ in range(2):
        _, received = next(worker.receive())
        assert received is not None
        received.close()
    for count in (2, 70_000, 1):  # the last one counts: of two one is still open
        worker.report(count)
    assert parent.read_reports()
    assert parent.connections == 1 + 3
    assert not parent.read_reports()


def test_a_report_that_arrives_in_two_pieces_is_put_together(
    ends: tuple[ParentEnd, WorkerEnd],
) -> None:
    parent, worker = ends
    report = b"\0\0\0\0\0\0\0\0" + b"\0\0\0\7"
    worker.channel.send(report + report[:9])
    assert parent.read_reports() and parent.connections == 7
    worker.channel.send(b"\0\0\3")
    assert parent.read_reports() and parent.connections == 3


def test_both_ends_notice_that_the_other_has_ended(ends: tuple[ParentEnd, WorkerEnd]) -> None:
    parent, worker = ends
    worker.channel.close()
    with pytest.raises(ChannelClosed):
        parent.read_reports()
    with socket.socket() as connection:
        assert not parent.pass_connection(MAIN, connection)
    parent.pass_signal(signal.SIGTERM)  # no error
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        ours.close()
        with pytest.raises(ChannelClosed):
            list(WorkerEnd(theirs).receive())
        WorkerEnd(theirs).report(1)  # no error


def test_a_worker_that_takes_nothing_is_full_at_last(ends: tuple[ParentEnd, WorkerEnd]) -> None:
    parent, worker = ends
    with socket.socket() as connection:
        passed = 0
        while parent.pass_connection(MAIN, connection):
            passed += 1
            assert passed < 100_000
        assert passed > 10
        for _, received in worker.receive():
            assert received is not None
            received.close()
        assert parent.pass_connection(MAIN, connection)
