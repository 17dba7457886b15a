"""The real process with a port of its own for the admin endpoints."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import ServerProcess, run_server
from tests.support.waiting import poll_until

WAIT_S = 30.0


def await_sample(url: str, line: str) -> None:
    """Waits until the metrics have this line."""
    poll_until(
        lambda: line in httpx.get(f"{url}/metrics").text.splitlines(),
        timeout_s=WAIT_S,
        pause_s=0.02,
    )


def test_both_ports_are_served_and_drained_together(tmp_path: Path) -> None:
    publish(tmp_path / "models")
    flags = ("--model-repo", str(tmp_path / "models"), "--device", "cpu", "--threads", "1")
    # A lone canvas waits that long: time for a signal while its request is in work.
    slow = ("--max-delay-ms", "3000", "--admin-port", "0")
    with run_server(tmp_path / "server.log", *flags, *slow) as server, ThreadPoolExecutor() as pool:
        (admin,) = re.findall(r"admin endpoints on (http://\S+)", server.read_log())
        assert admin.startswith("http://127.0.0.1:")
        assert admin != server.url
        assert httpx.get(f"{server.url}/metrics").status_code == 404
        assert httpx.get(f"{admin}/v2/health/ready").status_code == 200
        accepted = pool.submit(
            httpx.post,
            f"{server.url}/segment",
            content=encode_picture(draw_picture()),
            timeout=WAIT_S,
        )
        await_sample(admin, "solo_queue_images 1.0")  # accepted, not only begun
        server.terminate()
        await_sample(admin, "solo_ready 0.0")
        assert httpx.get(f"{admin}/healthz").json() == {"status": "draining"}
        assert accepted.result().status_code == 200
        assert server.wait() == 0
        assert "Traceback" not in server.read_log()


def test_an_admin_port_that_is_taken_stops_the_start_with_the_reason(tmp_path: Path) -> None:
    publish(tmp_path / "models")
    flags = ("--model-repo", str(tmp_path / "models"), "--device", "cpu", "--threads", "1")
    with run_server(tmp_path / "first.log", *flags, "--admin-port", "0") as server:
        (port,) = re.findall(r"admin endpoints on http://127.0.0.1:(\d+)", server.read_log())
        second = ServerProcess(tmp_path / "second.log", *flags, "--admin-port", port)
        assert second.wait() == 1
        reason = f"solo-serve: error: cannot serve admin endpoints on 127.0.0.1:{port}: "
        assert reason in second.read_log()
        assert "Traceback" not in second.read_log()
