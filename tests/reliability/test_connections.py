"""Behaviour 3, one layer further out: connections are bounded as well."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.load import read_metrics
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import CPU_FLAGS, ServerProcess, run_server

PICTURE = encode_picture(draw_picture())
MAX_CONNECTIONS = 4
REJECTED = 'solo_rejections_total{reason="%s"}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("connections")
    publish(root / "repo")
    limits = ("--max-connections", str(MAX_CONNECTIONS), "--body-timeout-s", "0.5")
    with run_server(root / "log", "--model-repo", str(root / "repo"), *CPU_FLAGS, *limits) as found:
        yield found


def connect(server: ServerProcess) -> socket.socket:
    address = urlsplit(server.url)
    assert address.hostname is not None
    assert address.port is not None
    return socket.create_connection((address.hostname, address.port), timeout=90)


@pytest.fixture
def full(server: ServerProcess) -> Iterator[None]:
    """All places are taken by clients that never end their request's head."""
    taken = [connect(server) for _ in range(MAX_CONNECTIONS)]
    for held in taken:
        held.sendall(b"POST /segment HTTP/1.1\r\nHost: a\r\n")
    deadline_s = time.monotonic() + 30
    while httpx.post(f"{server.url}/segment", content=PICTURE).status_code != 503:
        assert time.monotonic() < deadline_s
    yield
    for held in taken:
        held.close()
    while httpx.post(f"{server.url}/segment", content=PICTURE).status_code != 200:
        assert time.monotonic() < deadline_s


@pytest.mark.usefixtures("full")
def test_a_full_server_says_so_and_is_still_seen_to_live(server: ServerProcess) -> None:
    before = read_metrics(server.url)[REJECTED % "connections"]
    answers = [httpx.post(f"{server.url}/segment", content=PICTURE * 100) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
    assert {answer.json()["error"]["code"] for answer in answers} == {"overloaded"}
    for path in ("/v2/health/live", "/v2/health/ready", "/healthz"):
        assert httpx.get(server.url + path).status_code == 200
    rejected = read_metrics(server.url)[REJECTED % "connections"] - before
    assert rejected == 20


def test_a_body_that_stops_coming_is_answered_408(server: ServerProcess) -> None:
    with connect(server) as held:
        held.sendall(b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
        answer = held.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"fewer than 512 bytes of the body came in 0.5 s; 3 bytes were here" in answer
    assert read_metrics(server.url)[REJECTED % "body_timeout"] == 1


@pytest.mark.slow
def test_clients_that_never_ask_lose_their_place(server: ServerProcess) -> None:
    taken = [connect(server) for _ in range(MAX_CONNECTIONS)]
    taken[0].sendall(b"POST /segment HTTP/1.1\r\nHost: a\r\n")
    began_s = time.monotonic()
    assert [held.recv(1) for held in taken] == [b""] * MAX_CONNECTIONS
    assert 29 < time.monotonic() - began_s < 90
    assert httpx.post(f"{server.url}/segment", content=PICTURE).status_code == 200
