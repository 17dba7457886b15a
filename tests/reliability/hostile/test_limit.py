"""More connections than a server allows."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.reliability.hostile.target import TARGETS, build_flags, find_target
from tests.support.blob_model import publish
from tests.support.server import run_server

LIMIT = 20
HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("name", TARGETS)
def test_above_the_limit_only_health_is_served(name: str, tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    flags = (*build_flags(name, tmp_path / "repo"), "--max-connections", str(LIMIT))
    with run_server(tmp_path / "log", *flags) as server, ExitStack() as stack:
        target = find_target(name, server)
        before = target.count_descriptors()
        for _ in range(LIMIT):
            stack.enter_context(target.connect())
        other = target.build_post(target.good_body)
        with target.connect() as wire:
            wire.send(other).expect_status(503)
            wire.expect_close()
        for first, second in ((HEAD + b"\r\n" + other, b""), (HEAD + b"\r\n", other)):
            with target.connect() as wire:
                wire.send(first).expect_status(200)
                wire.send(second).expect_close()
        for _ in range(10 * LIMIT):
            stack.enter_context(target.connect()).send(HEAD).pause(0.002)
        with target.connect() as wire:
            wire.send(HEAD + b"\r\n").expect_status(200)
        assert target.count_descriptors() <= before + 2 * LIMIT + 5
        assert "Traceback" not in server.read_log()
