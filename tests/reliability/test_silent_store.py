"""A drain while an object store does not answer: neither its files nor a submission hold it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.reliability.test_jobs import build_flags
from tests.support.s3_server import ENVIRONMENT, serve_store
from tests.support.server import run_server
from tests.support.waiting import poll_until

pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra s3")
IN_FLIGHT = 8


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_silent_store_does_not_hold_a_drain(tmp_path: Path, workers: str) -> None:
    paths = {f"bucket/in/{number:03}.png" for number in range(3 * IN_FLIGHT)}
    with serve_store(dict.fromkeys(paths, b"")) as store, ThreadPoolExecutor(1) as sender:
        store.silent |= paths
        flags = ["--jobs-roots", f"s3://bucket/in{store.settings}", "--workers", workers]
        flags += ["--jobs-in-flight", str(IN_FLIGHT), *build_flags(tmp_path)]
        with run_server(tmp_path / "log", *flags, environment=ENVIRONMENT) as server:
            body = {"inputs": ["s3://bucket/in/"]}

            def submit() -> httpx.Response:
                return httpx.post(f"{server.url}/v2/jobs", json=body, timeout=60)

            assert submit().status_code == 202
            files = int(workers) * IN_FLIGHT
            poll_until(
                lambda: sum(method == "HEAD" for method, _, _ in list(store.requests)) >= files,
                timeout_s=60,
                pause_s=0.02,
            )
            store.silent.add("bucket")
            asked = store.count("GET", "bucket")
            answer = sender.submit(submit)
            poll_until(lambda: store.count("GET", "bucket") > asked, timeout_s=60, pause_s=0.02)
            began_s = time.monotonic()
            server.terminate()
            assert answer.result().json()["code"] == "draining"
            assert server.wait() == 0, server.read_log()
            assert time.monotonic() - began_s < 25  # the drain alone may take 30 s
            assert "not ended" not in server.read_log()
