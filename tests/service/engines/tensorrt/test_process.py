from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.canvases import Bucket
from service.engines.tensorrt.cache import BuildOptions, EngineCache, Environment, build_key
from service.engines.tensorrt.process import Reporter, build_job
from service.models.builder import BuildJob

ROOT = Path(__file__).resolve().parents[4]
OPTIONS = BuildOptions(buckets=(Bucket((64, 64), (64, 64), (64, 64)),), precision="fp16")
GRAPH = b"line one\nline two\x00" * 1000

# The builder's process with the fakes in TensorRT's and cuda-core's places.
START = """
import os, sys
from types import ModuleType
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_tensorrt import FakeTensorrt, build_error
cuda = FakeCuda()
tensorrt = FakeTensorrt(cuda)
sys.modules.update(
    {{"cuda": ModuleType("cuda"), "cuda.core": cuda.module, "tensorrt": tensorrt.module}}
)
{change}
from service.engines.tensorrt.process import main
status = main()
print("niceness", os.nice(0), file=sys.stderr)
raise SystemExit(status)
"""


def run(job: BuildJob, change: str = "pass") -> tuple[int, list[dict[str, object]], str]:
    """Exit status, messages and stderr of a builder; stdin stays open, as the server's does."""
    with subprocess.Popen(
        [sys.executable, "-c", START.format(change=change)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(job.stdin)
        process.stdin.flush()
        messages = [json.loads(line) for line in process.stdout]
        errors = process.stderr.read().decode()
        return process.wait(), messages, errors


def test_a_job_fills_the_cache(tmp_path: Path) -> None:
    job = build_job(GRAPH, OPTIONS, tmp_path / "engines")
    status, messages, errors = run(job)
    assert status == 0, errors
    assert messages[0] == {"status": "reading the graph", "progress": 0.0}
    assert messages[-1] == {"done": True}
    environment = Environment(tensorrt="10.16.1.11", cuda="13.0", sm="sm_90", gpu="Fake GPU")
    key = build_key(GRAPH, OPTIONS, environment)
    assert EngineCache(tmp_path / "engines").load(key) is not None
    assert f"niceness {min(os.nice(0) + 10, 19)}\n" in errors


def test_what_a_library_prints_is_no_message(tmp_path: Path) -> None:
    change = """
build = tensorrt.module.Builder.build_serialized_network
def chatty(self, network, config):
    os.write(1, b"[TRT] a warning from C++\\n")
    return build(self, network, config)
tensorrt.module.Builder.build_serialized_network = chatty
"""
    status, messages, errors = run(build_job(GRAPH, OPTIONS, tmp_path), change)
    assert status == 0, errors
    assert messages[-1] == {"done": True}
    assert "[TRT] a warning from C++" in errors


def test_a_failure_is_the_last_message(tmp_path: Path) -> None:
    change = "tensorrt.errors = [build_error('head/deform', 'DeformConv', 'no importer')]"
    status, messages, _ = run(build_job(GRAPH, OPTIONS, tmp_path), change)
    assert status == 1
    assert messages[-1] == {
        "error": "TensorRT cannot read the graph: node head/deform (DeformConv): no importer"
    }


def test_an_engine_that_cannot_be_stored_is_a_failure(tmp_path: Path) -> None:
    """The server could not load it."""
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    status, messages, _ = run(build_job(GRAPH, OPTIONS, blocked / "engines"))
    assert status == 1
    assert "not stored in" in str(messages[-1]["error"])


def test_it_ends_when_stdin_ends(tmp_path: Path) -> None:
    change = """
import time
tensorrt.module.Builder.create_network = lambda self, flags: time.sleep(600)
"""
    done = subprocess.run(
        [sys.executable, "-c", START.format(change=change)],
        input=build_job(GRAPH, OPTIONS, tmp_path).stdin,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 1


def test_not_every_step_is_reported() -> None:
    stream = io.BytesIO()
    report = Reporter(stream)
    for step in range(1001):
        report("tactics", step / 1000)
    messages = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert messages[0] == {"status": "tactics", "progress": 0.0}
    assert messages[-1] == {"status": "tactics", "progress": 1.0}
    assert len(messages) < 500
