from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.scale.workers import channel
from service.scale.workers.channel import (
    ADMIN,
    MAIN,
    ChannelClosed,
    Message,
    Order,
    ParentEnd,
    State,
    WorkerEnd,
)

Ends = tuple[ParentEnd, WorkerEnd]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ParentEnd(ours), WorkerEnd(theirs)


@contextmanager
def without_descriptors() -> Iterator[None]:
    """The limit is the lowest free descriptor, so none can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def close_all(messages: list[Message]) -> None:
    for message in messages:
        if message.connection is not None:
            message.connection.close()


def test_connections_and_signals_arrive_in_their_order(ends: Ends) -> None:
    parent, worker = ends
    pairs = [socket.socketpair() for _ in range(3)]
    for number, (ours, theirs) in zip((MAIN, ADMIN, MAIN), pairs, strict=True):
        assert parent.pass_connection(number, theirs)
        ours.sendall(b"%d" % number)
    assert parent.send(Order.SIGNAL, signal.SIGTERM)
    received = list(worker.receive())
    kinds = [(message.kind, message.number) for message in received]
    connections = [(Order.CONNECTION, number) for number in (MAIN, ADMIN, MAIN)]
    assert kinds == [*connections, (Order.SIGNAL, signal.SIGTERM)]
    for message in received[:3]:
        assert message.connection is not None
        assert message.connection.recv(10) == b"%d" % message.number
    assert received[3].connection is None
    assert list(worker.receive()) == []
    close_all(received)
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_metrics_are_asked_for_with_a_tag_that_comes_back(ends: Ends) -> None:
    parent, worker = ends
    worker.ask(2**32 - 1)
    worker.report(3, State.REFUSES)
    worker.ask(7)
    assert parent.read() == [2**32 - 1, 7]
    assert (parent.connections, parent.state) == (3, State.REFUSES)
    one, other = socket.socketpair()
    with one, other:
        assert parent.send(Order.COLLECT, carried=one)
        assert parent.send(Order.METRICS, 5, 2**32 - 1, carried=other)
        assert parent.send(Order.METRICS, 6, 7)
    collect, found, missing = worker.receive()
    assert collect.kind is Order.COLLECT and collect.connection is not None
    assert (found.kind, found.number, found.tag) == (Order.METRICS, 5, 2**32 - 1)
    assert found.connection is not None
    collect.connection.sendall(b"metrics")
    assert found.connection.recv(10) == b"metrics"
    assert (missing.number, missing.tag, missing.connection) == (6, 7, None)
    close_all([collect, found])


def test_connections_are_those_reported_and_those_on_their_way(ends: Ends) -> None:
    parent, worker = ends
    assert parent.read() is None
    for _ in range(5):
        assert parent.pass_connection(MAIN, socket.socket())
    assert parent.connections == 5
    received = [next(worker.receive()) for _ in range(2)]
    for count in (2, 70_000, 1):  # the last one counts: of two one is still open
        worker.report(count, State.SERVES)
    assert parent.read() == []
    assert parent.connections == 1 + 3
    assert parent.read() is None
    close_all(received)
    for _, connection in parent.take_back():
        connection.close()


def test_only_connections_that_were_not_received_are_taken_back(ends: Ends) -> None:
    parent, worker = ends
    given = [socket.socket() for _ in range(4)]
    for number, connection in zip((MAIN, ADMIN, ADMIN, MAIN), given, strict=True):
        assert parent.pass_connection(number, connection)
    received = [next(worker.receive()) for _ in range(2)]
    worker.report(2, State.SERVES)
    assert parent.read() == []
    assert [connection.fileno() == -1 for connection in given] == [True, True, False, False]
    assert parent.take_back() == [(ADMIN, given[2]), (MAIN, given[3])]
    assert parent.take_back() == [] and parent.connections == 2
    for connection in given:
        connection.close()
    close_all(received)


def test_a_report_that_arrives_in_two_pieces_is_put_together(ends: Ends) -> None:
    parent, worker = ends
    worker.report(7, State.SERVES)
    report = parent.channel.recv(100)
    worker.channel.send(report + report[:9])
    assert parent.read() == [] and parent.connections == 7
    heard_s = parent.heard_s
    worker.channel.send(report[9:])
    assert parent.read() == [] and parent.connections == 7
    assert heard_s < parent.heard_s <= time.monotonic()


def test_an_order_that_arrives_in_two_pieces_is_put_together(ends: Ends) -> None:
    parent, worker = ends
    parent.send(Order.SIGNAL, signal.SIGHUP)
    order = worker.channel.recv(100)
    parent.channel.send(order[:3])
    assert list(worker.receive()) == []
    with socket.socket() as connection:
        socket.send_fds(parent.channel, [order[3:]], [connection.fileno()])
    (message,) = worker.receive()
    assert (message.kind, message.number) == (Order.SIGNAL, signal.SIGHUP)
    close_all([message])


def test_a_descriptor_that_cannot_be_received_is_a_connection_without_one(ends: Ends) -> None:
    parent, worker = ends
    ours, theirs = socket.socketpair()
    with ours:
        assert parent.pass_connection(MAIN, theirs)
        parent.send(Order.SIGNAL, signal.SIGHUP)
        with without_descriptors():
            lost, order = worker.receive()
        assert (lost.kind, lost.number, lost.connection) == (Order.CONNECTION, MAIN, None)
        assert (order.kind, order.number) == (Order.SIGNAL, signal.SIGHUP)
        worker.report(0, State.SERVES)
        assert parent.read() == []  # it counts as received, so it is closed everywhere
        assert ours.recv(10) == b""
    again = socket.socket()
    assert parent.pass_connection(MAIN, again)
    (message,) = worker.receive()
    assert message.connection is not None
    close_all([message])
    again.close()


def test_both_ends_notice_that_the_other_has_ended(ends: Ends) -> None:
    parent, worker = ends
    worker.report(1, State.SERVES)
    worker.channel.close()
    assert parent.read() == []  # what it sent before
    with pytest.raises(ChannelClosed):
        parent.read()
    with socket.socket() as connection:
        assert not parent.pass_connection(MAIN, connection)
        assert connection.fileno() >= 0
    assert not parent.send(Order.SIGNAL, signal.SIGTERM)
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        ours.close()
        with pytest.raises(ChannelClosed):
            list(WorkerEnd(theirs).receive())
        WorkerEnd(theirs).report(1, State.SERVES)  # no error


def test_a_worker_that_takes_nothing_is_full_at_last(ends: Ends) -> None:
    parent, worker = ends
    with socket.socket() as connection:
        passed = 0
        while parent.pass_connection(MAIN, connection):
            passed += 1
            assert passed < 100_000
        assert passed > 10
        close_all(list(worker.receive()))
        assert parent.pass_connection(MAIN, connection)


def test_messages_are_taken_in_bounded_numbers(ends: Ends) -> None:
    """So that a flood of connections leaves the event loop time for those it has."""
    parent, worker = ends
    for _ in range(channel._MOST_AT_ONCE + 1):
        assert parent.send(Order.SIGNAL, signal.SIGHUP)
    assert len(list(worker.receive())) == channel._MOST_AT_ONCE
    assert len(list(worker.receive())) == 1
