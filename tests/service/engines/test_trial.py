from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.model_config import ModelConfig
from pipeline.types import Tile
from service.engines import trial
from service.engines.base import BackendOptions
from service.engines.trial import (
    BASELINE,
    Candidate,
    TrialRecord,
    build_key,
    draw_picture,
    measure_candidates,
    rank,
)
from tests.service.engines.test_ort_session import read_config
from tests.support.blob_model import KEEP_RATIO_INPUT
from tests.support.clock import SetClock

OTHER = "fast bf16"


class TimedEngine:
    """An engine whose calls take the seconds given, one after the other, then the last for ever."""

    def __init__(self, clock: SetClock, *seconds: float | Exception) -> None:
        self._clock = clock
        self._seconds = list(seconds)
        self.calls: list[Sequence[Tile]] = []
        self.is_closed = False

    def infer(self, tiles: Sequence[Tile]) -> list[Any]:
        self.calls.append(tiles)
        step = self._seconds[min(len(self.calls), len(self._seconds)) - 1]
        if isinstance(step, Exception):
            raise step
        self._clock.now_s += step
        return []

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SetClock]:
    clock = SetClock()
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    trial._remembered.clear()
    yield clock
    trial._remembered.clear()


@pytest.fixture
def options(tmp_path: Path) -> BackendOptions:
    return BackendOptions(device="cpu", threads=1, cache=tmp_path / "cache")


def candidates_of(**engines: TimedEngine | Exception) -> list[Candidate]:
    def build(name: str) -> Any:
        engine = engines[name]
        if isinstance(engine, Exception):
            raise engine
        return engine

    names = {"baseline": BASELINE, "other": OTHER}
    return [Candidate(names[n], "model.onnx", lambda n=n: build(n)) for n in engines]  # type: ignore[misc]


def measure(options: BackendOptions, config: ModelConfig | None = None, **engines: Any) -> Any:
    return measure_candidates(candidates_of(**engines), options, config or read_config())


def test_the_least_time_of_each_counts_and_the_first_round_does_not(
    clock: SetClock, options: BackendOptions
) -> None:
    baseline = TimedEngine(clock, 0.01, 0.01, 0.09, 0.05, 0.04, 0.06, 0.07)
    other = TimedEngine(clock, 0.6, 0.6, 0.03, 0.03, 0.02, 0.04, 0.07)
    assert measure(options, baseline=baseline, other=other) == pytest.approx(
        {BASELINE: 0.05, OTHER: 0.03}
    )
    assert baseline.is_closed and other.is_closed


def test_candidates_have_their_turns_until_the_time_is_over(
    clock: SetClock, options: BackendOptions
) -> None:
    baseline, other = TimedEngine(clock, 0.05), TimedEngine(clock, 0.05)
    measure(options, baseline=baseline, other=other)
    # Two canvases in each of two engines take 0.2 s of a round, and 2 s are for both.
    assert len(baseline.calls) == len(other.calls) == pytest.approx(2 * 11, abs=2)
    assert {len(tiles) for tiles in baseline.calls} == {1}


def test_slow_engines_are_timed_once(clock: SetClock, options: BackendOptions) -> None:
    baseline, other = TimedEngine(clock, 100.0), TimedEngine(clock, 90.0)
    assert measure(options, baseline=baseline, other=other) == {BASELINE: 100.0, OTHER: 90.0}
    assert len(baseline.calls) == 2 * 2  # two canvases; the first round warms up


@pytest.mark.parametrize(
    "broken",
    [RuntimeError("no such operator"), [RuntimeError("first run")], [0.1, 0.1, MemoryError()]],
    ids=["cannot be built", "first run", "later run"],
)
def test_a_candidate_that_fails_is_left_out(
    clock: SetClock, options: BackendOptions, broken: Any
) -> None:
    baseline = TimedEngine(clock, 0.5)
    other = broken if isinstance(broken, Exception) else TimedEngine(clock, *broken)
    assert measure(options, baseline=baseline, other=other) == {BASELINE: 0.5}
    assert baseline.is_closed
    assert not isinstance(other, TimedEngine) or other.is_closed


def test_times_are_read_by_other_processes(clock: SetClock, options: BackendOptions) -> None:
    baseline, other = TimedEngine(clock, 0.5), TimedEngine(clock, 0.25)
    first = measure(options, baseline=baseline, other=other)
    trial._remembered.clear()
    unused = RuntimeError("must not be built")
    assert measure(options, baseline=unused, other=unused) == first
    assert options.cache is not None
    (file,) = (options.cache / "engine-times").glob("*.json")
    assert json.loads(file.read_text())["seconds"] == first


def test_without_a_folder_times_are_kept_in_the_process(
    clock: SetClock, options: BackendOptions, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    nowhere = replace(options, cache=tmp_path / "file")
    first = measure(nowhere, baseline=TimedEngine(clock, 0.5))
    assert measure(nowhere, baseline=RuntimeError("must not be built")) == first


def test_a_trial_without_its_baseline_is_not_stored(
    clock: SetClock, options: BackendOptions
) -> None:
    fails = MemoryError("for now")
    assert measure(options, baseline=fails, other=TimedEngine(clock, 0.5)) == {OTHER: 0.5}
    assert options.cache is not None
    assert list((options.cache / "engine-times").glob("*.json")) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 60_000, b"x" * (trial.MAX_RECORD_BYTES + 1), b'{"key": 1}', b"\xff\xfe"],
    ids=["empty", "cut", "deep", "huge", "of another kind", "binary"],
)
def test_a_damaged_record_is_measured_again(
    clock: SetClock, options: BackendOptions, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    measure(options, baseline=TimedEngine(clock, 0.5))
    assert options.cache is not None
    (file,) = (options.cache / "engine-times").glob("*.json")
    file.write_bytes(content)
    trial._remembered.clear()
    assert measure(options, baseline=TimedEngine(clock, 0.25)) == {BASELINE: 0.25}
    assert "timed again" in caplog.text
    trial._remembered.clear()
    assert measure(options, baseline=RuntimeError("must not be built")) == {BASELINE: 0.25}


def test_a_record_with_another_key_is_not_taken(clock: SetClock, options: BackendOptions) -> None:
    measure(options, baseline=TimedEngine(clock, 0.5))
    assert options.cache is not None
    (file,) = (options.cache / "engine-times").glob("*.json")
    record = TrialRecord.model_validate_json(file.read_bytes())
    moved = record.model_copy(update={"key": record.key.model_copy(update={"cpu": "another"})})
    file.write_text(moved.model_dump_json())
    trial._remembered.clear()
    assert measure(options, baseline=TimedEngine(clock, 0.25)) == {BASELINE: 0.25}


def test_what_decides_the_times_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    config = read_config()
    candidates = [Candidate(BASELINE, "model.onnx", lambda: None)]  # type: ignore[arg-type, return-value]
    more = [*candidates, Candidate(OTHER, "model.onnx", lambda: None)]  # type: ignore[arg-type, return-value]
    (spec,) = config.files.values()
    digest = hashlib.sha256(b"other").hexdigest()
    other_file = {"model.onnx": spec.model_copy(update={"sha256": digest})}
    keys = [
        build_key(candidates, config),
        build_key(more, config),
        build_key(candidates, read_config(input=KEEP_RATIO_INPUT)),
        build_key(candidates, config.model_copy(update={"files": other_file})),
    ]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    keys.append(build_key(candidates, config))
    monkeypatch.setattr(trial, "read_cpu", lambda: ("another processor", "avx2"))
    keys.append(build_key(candidates, config))
    monkeypatch.setattr(trial, "read_cpu", lambda: ("another processor", "avx2 avx512f"))
    keys.append(build_key(candidates, config))
    monkeypatch.setattr(trial, "_find_version", lambda name: "99.0")
    keys.append(build_key(candidates, config))
    assert len({key.digest for key in keys}) == len(keys)
    assert build_key(candidates, config) == keys[-1]


def test_callers_that_differ_in_threads_choose_the_same(
    clock: SetClock, options: BackendOptions
) -> None:
    server = measure(options, baseline=TimedEngine(clock, 0.25))
    for caller in (
        replace(options, threads=None),
        replace(options, threads=64, slots=8, divide="all"),
    ):
        trial._remembered.clear()
        assert measure(caller, baseline=TimedEngine(clock, 1.0)) == server


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({}, [BASELINE]),
        ({BASELINE: 1.0}, [BASELINE]),
        ({BASELINE: 1.0, "a": 0.96}, [BASELINE]),
        ({BASELINE: 1.0, "a": 0.95}, [BASELINE]),
        ({BASELINE: 1.0, "a": 0.94}, ["a", BASELINE]),
        ({BASELINE: 1.0, "a": 0.5, "b": 0.4, "c": 2.0}, ["b", "a", BASELINE]),
        ({"a": 2.0}, ["a", BASELINE]),
    ],
)
def test_only_what_is_clearly_faster_goes_before_the_baseline(
    seconds: dict[str, float], expected: list[str]
) -> None:
    assert rank(seconds) == expected


def test_processes_that_start_together_measure_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    text = f"""
import time
from pathlib import Path
from service.engines.base import BackendOptions
from service.engines.trial import BASELINE, Candidate, measure_candidates
from tests.service.engines.test_ort_session import read_config

class Engine:
    def infer(self, tiles):
        time.sleep(0.02)
    def close(self):
        pass

def build():
    with open({str(log)!r}, "a") as file:
        file.write("built\\n")
    return Engine()

options = BackendOptions(threads=1, cache=Path({str(tmp_path / "cache")!r}))
candidates = [Candidate(BASELINE, "model.onnx", build)]
print(measure_candidates(candidates, options, read_config()))
"""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", text]
    processes = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = {process.communicate(timeout=100)[0] for process in processes}
    assert log.read_text() == "built\n"
    (answer,) = answers
    assert BASELINE in answer


def test_the_picture_is_full_of_objects_of_two_greys_and_is_always_the_same() -> None:
    picture = draw_picture(96, 128)
    assert picture.shape == (96, 128, 3) and picture.dtype == np.uint8
    assert 0.2 < (picture > 95).mean() < 0.9
    np.testing.assert_array_equal(picture, draw_picture(96, 128))


def test_threads_of_a_process_may_measure_at_once(clock: SetClock, options: BackendOptions) -> None:
    built = threading.Semaphore(0)

    def build() -> Any:
        built.release()
        return TimedEngine(clock, 0.5)

    candidates = [Candidate(BASELINE, "model.onnx", build)]
    config = read_config()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(measure_candidates, candidates, options, config) for _ in range(4)]
        assert [call.result(30) for call in calls] == [{BASELINE: 0.5}] * 4
    assert built.acquire(blocking=False)
    assert not built.acquire(blocking=False)
