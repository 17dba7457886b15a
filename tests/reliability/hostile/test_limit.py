"""More connections, and more bytes of bodies, than a server allows; all timeouts are long."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.reliability.hostile.target import (
    BODY_BYTES,
    PICTURE,
    TARGETS,
    ask,
    build_flags,
    find_target,
)
from tests.support.blob_model import publish
from tests.support.server import run_server
from tests.support.waiting import poll_until

LIMIT = 20
HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("name", TARGETS)
def test_above_the_limit_only_health_is_served(name: str, tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    flags = (*build_flags(name, tmp_path / "repo"), "--max-connections", str(LIMIT))
    with run_server(tmp_path / "log", *flags) as server, ExitStack() as stack:
        target = find_target(name, server)
        before = target.count_descriptors()
        for _ in range(2 * LIMIT):  # those of two workers may not be evenly divided
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


@pytest.mark.parametrize("name", ["process", "workers"])  # the admin port takes small bodies only
def test_bodies_cannot_fill_the_memory(name: str, tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    limits = ("--max-body-bytes", "2000000", "--max-bodies-bytes", "8000000")
    flags = (*build_flags(name, tmp_path / "repo"), *limits)
    with run_server(tmp_path / "log", *flags) as server, ExitStack() as stack:
        target = find_target(name, server)
        wires = [stack.enter_context(target.connect()) for _ in range(16)]
        for wire in wires:
            wire.send(target.build_post(bytes(1_900_000), length=2_000_000))
        held = target.read_metric(BODY_BYTES)
        assert 2 * 1_900_000 <= held <= 8_000_000
        assert ask(target.main_port, "POST", "/segment", PICTURE)[0] == 200
        refused = [wire for wire in wires if wire.is_answered()]
        assert len(refused) >= 12
        for wire in refused:
            wire.expect_status(503)
            wire.expect_close()
        stack.close()
        poll_until(lambda: target.read_metric(BODY_BYTES) == 0, timeout_s=10, pause_s=0.05)
