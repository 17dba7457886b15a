"""Clients that mean harm, or that are broken; after each the server is as it was before.

A case is a function of a `Target`; see `wire.py` for what a client can do. Register it with
`@case` or `@long_case`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
from _pytest.mark.structures import ParameterSet

from tests.reliability.conftest import Report
from tests.reliability.hostile.health import HealthWatcher
from tests.reliability.hostile.target import (
    BODY_BYTES,
    MAX_BODY_BYTES,
    TARGETS,
    Target,
)
from tests.support.waiting import poll_until

Case = Callable[[Target], None]
CASES: list[Case] = []
LONG: list[Case] = []
GET_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = "Transfer-Encoding: chunked"


def case(function: Case) -> Case:
    """Runs the function against every target."""
    CASES.append(function)
    return function


def long_case(function: Case) -> Case:
    """A case that takes more than a second."""
    LONG.append(function)
    return case(function)


# Request line and headers


@long_case
def silent_connections(target: Target) -> None:
    with ExitStack() as stack:
        for wire in [stack.enter_context(target.connect()) for _ in range(10)]:
            wire.expect_close()


@case
def a_slow_head(target: Target) -> None:
    with target.connect() as wire:
        wire.send_slowly(target.build_head("X: " + "a" * 100), 0.05).expect_status(408)
        wire.expect_close()


@long_case
def empty_lines_for_ever(target: Target) -> None:
    with target.connect() as wire:
        wire.send_slowly(b"\r\n" * 100, 0.05).expect_status(408)
        wire.expect_close()


@long_case
def a_slow_second_head(target: Target) -> None:
    with target.connect() as wire:
        wire.send(GET_HEALTH).expect_status(200)
        wire.send_slowly(target.build_head("X: " + "a" * 100), 0.05).expect_status(408)


@case
def a_head_that_is_cut(target: Target) -> None:
    for end in ("close", "reset", "half close"):
        with target.connect() as wire:
            wire.send(target.build_head())
            if end == "reset":
                wire.reset()
            elif end == "half close":
                wire.half_close().expect_close()


@case
def a_header_of_8_megabytes(target: Target) -> None:
    with target.connect() as wire:
        wire.send(target.build_head(method="GET", path="/healthz") + b"X: ")
        wire.send(b"a" * 8_000_000).expect_status(431)
        wire.expect_close()


@case
def a_url_of_8_megabytes(target: Target) -> None:
    with target.connect() as wire:
        wire.send(b"GET /" + b"a" * 8_000_000).expect_status(431)


@case
def a_million_headers(target: Target) -> None:
    with target.connect() as wire:
        wire.send(target.build_head() + b"a:b\r\n" * 1_000_000).expect_status(431)


@case
def other_protocols(target: Target) -> None:
    for data in (
        bytes.fromhex("16030102000100") + bytes(512),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"\x00" * 1000,
        b"GET /\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        with target.connect() as wire:
            wire.send(data).expect_status(400)
            wire.expect_close()


@case
def smuggled_requests(target: Target) -> None:
    """Everything that two servers could read in two ways; what follows is never served."""
    inner = target.build_post(target.good_body)
    for headers, body in (
        (("Content-Length: 5", CHUNKED), b"0\r\n\r\n"),
        ((CHUNKED, "Content-Length: 5"), b"0\r\n\r\n"),
        (("Content-Length: 5", "Content-Length: 6"), b"abcde"),
        (("Content-Length: 5, 5",), b"abcde"),
        (("Content-Length: +5",), b"abcde"),
        (("Content-Length: 0x5",), b"abcde"),
        (("Content-Length : 5",), b"abcde"),
        (("Content-Length: " + "9" * 30,), b"abcde"),
        (("Transfer-Encoding: xchunked",), b"0\r\n\r\n"),
        (("Transfer-Encoding: gzip, chunked",), b"0\r\n\r\n"),
        ((CHUNKED, CHUNKED), b"0\r\n\r\n"),
        (("Transfer-Encoding: identity",), b"0\r\n\r\n"),
        (("Transfer-Encoding:\x0bchunked",), b"0\r\n\r\n"),
        (("X: a\r\n b", "Content-Length: 0"), b""),
        (("X: a\nY: b", "Content-Length: 0"), b""),
        (("X: a\rY: b", "Content-Length: 0"), b""),
        (("Host: y", "Content-Length: 0"), b""),
        (("X: a\x00b", "Content-Length: 0"), b""),
        ((CHUNKED,), b"0x1\r\na\r\n0\r\n\r\n"),
        ((CHUNKED,), b"-1\r\na\r\n0\r\n\r\n"),
        ((CHUNKED,), b"1 \r\na\r\n0\r\n\r\n"),
        ((CHUNKED,), b"1\na\r\n0\r\n\r\n"),
        ((CHUNKED,), b"1;a\na\r\n0\r\n\r\n"),
        ((CHUNKED,), b"1\r\nab\r\n0\r\n\r\n"),
        ((CHUNKED,), b"f" * 17 + b"\r\na\r\n0\r\n\r\n"),
    ):
        with target.connect() as wire:
            wire.send(target.build_head(*headers) + b"\r\n" + body + inner).expect_status(400)
            wire.expect_close()
    with target.connect() as wire:
        wire.send(b"GET /healthz HTTP/1.1\r\n\r\n" + inner).expect_status(400)
        wire.expect_close()


@case
def upgrades(target: Target) -> None:
    for protocol in ("h2c", "websocket"):
        with target.connect() as wire:
            offer = ("Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}")
            for _ in range(2):
                wire.send(target.build_post(target.good_body, *offer)).expect_status(200)


# Bodies


@case
def a_slow_body(target: Target) -> None:
    with target.connect() as wire:
        wire.send(target.build_post(b"", length=1000))
        wire.send_slowly(bytes(100), 0.05).expect_status(408)
        wire.expect_close()


@long_case
def a_body_at_the_least_rate_that_takes_too_long(target: Target) -> None:
    with target.connect() as wire:
        wire.send(target.build_post(b"", length=MAX_BODY_BYTES))
        wire.send_slowly(bytes(200_000), 0.02, piece=40).expect_status(408)


@long_case
def bodies_that_stop(target: Target) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(target.connect()) for _ in range(5)]
        count = target.good_bytes
        for wire in wires:
            wire.send(target.build_post(bytes(count), length=count + 1))
        poll_until(lambda: target.read_metric(BODY_BYTES) == 5 * count, timeout_s=5, pause_s=0.01)
        for wire in wires:
            wire.expect_status(408)
            wire.expect_close()


@case
def bodies_that_are_cut(target: Target) -> None:
    for start in (
        target.build_post(b"abc", length=5000),
        target.build_head(CHUNKED) + b"\r\n5\r\na",
    ):
        for end in ("close", "reset", "half close"):
            with target.connect() as wire:
                wire.send(start).pause(0.05)
                if end == "reset":
                    wire.reset()
                elif end == "half close":
                    wire.half_close().expect_close()


@long_case
def a_client_that_never_sends_the_body_it_announced(target: Target) -> None:
    with target.connect() as wire:
        wire.send(target.build_post(b"", "Expect: 100-continue", length=1000))
        wire.expect_status(100, within_s=5)
        wire.expect_status(408)


@case
def bodies_that_are_too_large(target: Target) -> None:
    with target.connect() as wire:
        wire.send(target.build_post(bytes(100_000), length=10**12)).expect_status(413)
        wire.expect_close()
    chunk = b"%x\r\n%b\r\n" % (100_000, bytes(100_000))
    with target.connect() as wire:
        wire.send(target.build_head(CHUNKED) + b"\r\n" + chunk * 100).expect_status(413)
        wire.expect_close()


@case
def chunked_framing_without_end(target: Target) -> None:
    head = target.build_head(CHUNKED) + b"\r\n"
    for framing in (
        b"1;" + b"a" * 2_000_000,
        b"1\r\na\r\n" * 300_000,
        b"1\r\na\r\n0\r\nX: " + b"a" * 2_000_000,
        b"1\r\na\r\n0\r\n" + b"X: a\r\n" * 300_000,
    ):
        with target.connect() as wire:
            # Trailers are headers. The admin port may refuse the length of the body first.
            wire.send(head + framing).expect_status(400, 413, 431)
            wire.expect_close()


@long_case
def a_body_behind_the_answer_without_end(target: Target) -> None:
    with target.connect() as wire:
        wire.send(target.build_head(CHUNKED, path="/nowhere") + b"\r\n").expect_status(404)
        wire.send_slowly(b"5\r\nabcde\r\n" * 100, 0.05, piece=5, attentive=False)
        wire.expect_close()


# Responses


@case
def clients_that_never_read(target: Target) -> None:
    path = "/metrics" if target.name == "admin" else "/openapi.json"
    request = target.build_head(method="GET", path=path) + b"\r\n"
    before = target.count_descriptors()
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(target.connect(receive_buffer=4096)).send(request * 17)
        poll_until(lambda: target.count_descriptors() >= before + 8, timeout_s=5, pause_s=0.01)
        poll_until(
            lambda: target.count_descriptors() <= before + 2,  # a request for health, /dev/null
            timeout_s=15,
            pause_s=0.05,
            describe=lambda: str(target.list_descriptors()),
        )


@case
def clients_that_end_their_sending_side(target: Target) -> None:
    for request in (
        GET_HEALTH,
        target.build_post(target.good_body),
        target.build_post(target.good_body, "Connection: close"),
        target.build_post(target.good_body).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ):
        with target.connect() as wire:
            wire.send(request).half_close().expect_status(200)
            wire.expect_close()


@case
def clients_that_leave_before_the_answer(target: Target) -> None:
    for _ in range(10):
        with target.connect() as wire:
            wire.send(target.build_post(target.good_body))
        with target.connect() as wire:
            wire.send(target.build_post(target.good_body)).reset()


@case
def pipelined_requests(target: Target) -> None:
    with target.connect() as wire:
        wire.send(target.build_post(target.good_body) * 10)
        for _ in range(10):
            wire.expect_status(200)


@case
def ten_thousand_pipelined_requests(target: Target) -> None:
    with target.connect() as wire:
        answers = wire.send(GET_HEALTH * 10_000).read_until_closed()
    assert 1 <= answers.count(b"HTTP/1.1 200") < 10_000


@long_case
def connections_that_wait_for_ever(target: Target) -> None:
    with target.connect() as wire:
        wire.send(GET_HEALTH).expect_status(200)
        wire.expect_close()


@case
def twenty_resets_a_second(target: Target) -> None:
    for _ in range(20):
        target.connect().send(GET_HEALTH).reset()


def _list_cases() -> list[ParameterSet]:
    """All cases against one process; against the others the short ones, the rest marked slow."""
    return [
        pytest.param(
            name,
            attack,
            id=f"{name}-{attack.__name__}",
            marks=[pytest.mark.slow] if name != "process" and attack in LONG else [],
        )
        for name in TARGETS
        for attack in CASES
    ]


@pytest.mark.parametrize(("target", "attack"), _list_cases(), indirect=["target"])
def test_nothing_remains_of(
    target: Target, watcher: HealthWatcher, attack: Case, report: Report
) -> None:
    health = target.endure(attack, watcher)
    report("health_p99_ms", 1e3 * health.slowest_s)
