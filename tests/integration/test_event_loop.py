"""What holds the event loop up: not uvloop's absence, and no collection of what was imported."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import CPU_FLAGS, ROOT, run_server

FAST = ("uvloop",)
_REPORT = """
import gc, os, sys
end = os._exit
def report(status):
    print("loaded:", *(m for m in {fast} if m in sys.modules))
    print("frozen:", gc.get_freeze_count(), flush=True)
    end(status)
os._exit = report
"""


@pytest.mark.parametrize("blocked", [(), FAST])
def test_the_server_answers_and_drains_with_and_without_it(
    tmp_path: Path, blocked: tuple[str, ...]
) -> None:
    models, path = tmp_path / "models", tmp_path / "path"
    publish(models)
    path.mkdir()
    (path / "sitecustomize.py").write_text(_REPORT.format(fast=FAST))
    for name in blocked:
        (path / f"{name}.py").write_text("raise ImportError('blocked by a test')\n")
    environment = {"PYTHONPATH": f"{path}:{ROOT}"}
    flags = ("--model-repo", str(models), *CPU_FLAGS)
    with run_server(tmp_path / "log", *flags, environment=environment) as server:
        with httpx.Client(base_url=server.url) as client:
            picture = encode_picture(draw_picture())
            answers = [client.post("/segment", content=picture) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3
        server.terminate()
        assert server.wait() == 0
        rest, _, frozen = server.read_log().rpartition("frozen:")
    assert rest.rpartition("loaded:")[2].split() == [name for name in FAST if name not in blocked]
    assert int(frozen) > 10_000
