"""SIGTERM ends a server in time, whatever its clients do."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.reliability.conftest import Report
from tests.reliability.hostile.target import build_flags, find_target
from tests.support.blob_model import publish
from tests.support.server import run_server

DRAIN_S = 2.0


@pytest.mark.parametrize("name", ["process", "workers", "admin"])
def test_slow_clients_do_not_delay_the_end(name: str, tmp_path: Path, report: Report) -> None:
    """All timeouts are far longer than the drain."""
    publish(tmp_path / "repo")
    flags = (*build_flags(name, tmp_path / "repo"), "--drain-timeout-s", str(DRAIN_S))
    with run_server(tmp_path / "log", *flags) as server, ExitStack() as stack:
        target = find_target(name, server)

        def connect(count: int, data: bytes) -> None:
            for _ in range(count):
                stack.enter_context(target.connect(receive_buffer=4096)).send(data)

        path = "/metrics" if name == "admin" else "/openapi.json"
        connect(2, (target.build_head(method="GET", path=path) + b"\r\n") * 17)
        connect(5, b"")
        connect(5, b"GET /healthz HT")
        connect(5, target.build_post(target.good_body, length=100_000))
        uploading = stack.enter_context(target.connect())
        uploading.send(target.build_post(b"abc", length=100_000)).pause(0.5)
        began_s = time.monotonic()
        server.terminate()
        assert b'"code":"draining"' in uploading.expect_status(503)
        assert server.wait() == 0
        seconds = time.monotonic() - began_s
        assert "Traceback" not in server.read_log()
    report("ended_after_s", seconds)
    assert seconds < DRAIN_S + 8


def test_a_second_signal_ends_the_server_at_once(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    flags = (*build_flags("process", tmp_path / "repo"), "--drain-timeout-s", "600")
    with run_server(tmp_path / "log", *flags) as server, ExitStack() as stack:
        target = find_target("process", server)
        request = target.build_head(method="GET", path="/openapi.json") + b"\r\n"
        stack.enter_context(target.connect(receive_buffer=4096)).send(request * 17).pause(0.2)
        server.terminate()
        time.sleep(0.5)
        server.terminate()
        assert server.wait(30) == 128 + signal.SIGTERM
