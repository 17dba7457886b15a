"""Several real servers on one port."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx

from benchmarks.load import read_metrics
from benchmarks.serving import find_port
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import START_S, ServerProcess

PICTURE = encode_picture(draw_picture())
IMAGES = 'solo_images_total{model="blobs"}'


def await_admin(server: ServerProcess) -> str:
    """The address of its admin port, once it is ready."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        assert server.process.poll() is None, server.read_log()
        for url in re.findall(r"admin endpoints on (http://\S+)", server.read_log()):
            try:
                if httpx.get(f"{url}/v2/health/ready").status_code == 200:
                    return str(url)
            except httpx.TransportError:
                pass  # it listens, but does not answer yet
        time.sleep(0.05)
    raise AssertionError(server.read_log())


def test_servers_share_a_port_and_end_one_by_one(tmp_path: Path) -> None:
    publish(tmp_path / "models")
    port = find_port()
    flags = ["--model-repo", str(tmp_path / "models"), "--device", "cpu", "--threads", "1"]
    flags += ["--port", str(port), "--admin-port", "0", "--reuse-port", "true"]
    servers = [ServerProcess(tmp_path / f"{index}.log", *flags) for index in range(2)]
    try:
        admins = [await_admin(server) for server in servers]
        for _ in range(60):  # each with a connection of its own; all to one server: 1 in 2**59
            answer = httpx.post(f"http://127.0.0.1:{port}/segment", content=PICTURE, timeout=30)
            assert answer.status_code == 200
        counts = [read_metrics(url)[IMAGES] for url in admins]
        assert sum(counts) == 60
        assert min(counts) > 0
        servers[0].terminate()
        assert servers[0].wait() == 0
        for _ in range(10):
            answer = httpx.post(f"http://127.0.0.1:{port}/segment", content=PICTURE, timeout=30)
            assert answer.status_code == 200
        assert read_metrics(admins[1])[IMAGES] == counts[1] + 10
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()
