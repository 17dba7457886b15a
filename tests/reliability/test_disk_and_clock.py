"""Disks that are full and clocks that jump."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from benchmarks.load import read_metrics, run_closed_loop
from pipeline.canvases import Bucket
from service.engines.tensorrt.cache import BuildOptions, EngineCache, Environment, build_key
from tests.reliability.conftest import Report
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.journals import read_keys
from tests.support.server import CPU_FLAGS, ROOT, run_server

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
PICTURE = encode_picture(draw_picture())


def limit_files(size: int) -> Callable[[], None]:
    """For a new process: files may not grow beyond a size, as on a disk that is full there."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def predict(tmp_path: Path, out: Path, size: int | None = None) -> subprocess.CompletedProcess[str]:
    """solo-predict on the test's images, in process."""
    command = [sys.executable, "-m", "service.predict", str(tmp_path / "*.png"), "--quiet"]
    repo = ["--model-repo", str(tmp_path / "repo"), "--device", "cpu", "--out", str(out)]
    limit = None if size is None else limit_files(size)
    return subprocess.run(
        [*command, *repo], cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit
    )


def test_predict_on_a_full_disk_says_so_and_goes_on_later(tmp_path: Path, report: Report) -> None:
    publish(tmp_path / "repo")
    for index in range(30):
        boxes = {"red": (4, 8, 12 + index, 16), "green": (30, 2 + index, 10, 20)}
        (tmp_path / f"{index:02}.png").write_bytes(encode_picture(draw_picture(90, 70, boxes)))
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    assert predict(tmp_path, whole).returncode == 0
    failed = predict(tmp_path, cut, 2**17)
    assert failed.returncode == 1
    assert failed.stderr.startswith("solo-predict: error: ")
    assert "cannot use the journal" in failed.stderr and "cut.json.partial: " in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not cut.exists()
    done = len(read_keys(tmp_path / "cut.json.partial"))
    report("images_done_before_the_disk_was_full", done)
    assert 0 < done < 30
    assert predict(tmp_path, cut).returncode == 0
    assert json.loads(cut.read_bytes()) == json.loads(whole.read_bytes())


STORE = """
import sys
from pathlib import Path
from tests.reliability.test_disk_and_clock import KEY
from service.engines.tensorrt.cache import EngineCache
EngineCache(Path(sys.argv[1])).store(KEY, bytes(100_000), build_s=1.0)
"""
KEY = build_key(
    b"graph",
    BuildOptions(buckets=(Bucket(min_hw=(64, 64), opt_hw=(64, 64), max_hw=(64, 64)),)),
    Environment(tensorrt="10.16", cuda="13.0", sm="sm_90", gpu="test"),
)


def test_an_engine_cache_on_a_full_disk_has_no_half_engine(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STORE, str(tmp_path)]
    full = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit_files(50_000),
    )
    assert full.returncode == 1 and "File too large" in full.stderr
    assert EngineCache(tmp_path).load(KEY) is None
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]
    EngineCache(tmp_path).store(KEY, bytes(100_000), build_s=1.0)
    assert EngineCache(tmp_path).load(KEY) == bytes(100_000)


@pytest.mark.slow
@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is missing (apt-get install faketime)")
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, report: Report) -> None:
    """A day ahead, a year back and to now again, while requests with deadlines come in."""
    publish(tmp_path / "repo")
    clock = tmp_path / "clock"
    clock.write_text("+0", encoding="ascii")
    environment = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS)
    with run_server(tmp_path / "log", *flags, environment=environment) as server:
        jumps = iter([(0.5, "+1d"), (1.0, "-365d"), (1.5, "+0")])
        began_s = time.monotonic()
        at_s, offset = next(jumps)
        seen: list[str] = []

        def may_go_on(_: int) -> bool:
            nonlocal at_s, offset
            elapsed_s = time.monotonic() - began_s
            if elapsed_s > at_s:
                clock.write_text(offset, encoding="ascii")
                seen.append(offset)
                at_s, offset = next(jumps, (float("inf"), ""))
            return elapsed_s < 3

        path = "/segment?timeout_ms=20000"
        load = asyncio.run(
            run_closed_loop(server.url, [PICTURE], clients=4, may_go_on=may_go_on, path=path)
        )
        metrics = read_metrics(server.url)
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200
        log = server.read_log()
    report("requests", len(load.answers))
    assert seen == ["+1d", "-365d", "+0"]
    assert len({line[:4] for line in log.splitlines() if "POST /segment" in line}) > 1
    assert set(load.statuses) == {200}
    total = metrics['solo_stage_duration_seconds_sum{model="blobs",stage="total",version="1"}']
    assert 0 < total < 60  # no jump was taken for time
