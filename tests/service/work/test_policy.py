"""How an engine is used: by device, concurrency, threads and delay."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.model_config import Limits
from service.engines.watch import WatchedEngine
from service.settings import Settings
from service.work.policy import Policy, choose_policy
from tests.support.canvases import FakeEngine


def choose(device: str, concurrency: int, limits: Limits | None = None, **settings: Any) -> Policy:
    engine = FakeEngine(concurrency)
    engine.device = device
    watched = WatchedEngine(engine, lambda backend: None, timeout_s=1)
    given = {"threads": 4, "pool_threads": 3, **settings}
    return choose_policy(Settings(**given), watched, limits or Limits())


def test_on_the_cpu_an_image_keeps_its_thread_where_calls_run_side_by_side() -> None:
    assert choose("cpu", 2) == Policy(threads=2, calls=2)
    assert choose("cpu", 4) == Policy(threads=3, helpers=1, calls=4)
    assert choose("cpu", 1, pool_threads=1) == Policy(threads=1, calls=1)
    assert choose("cpu", 2, max_delay_ms=0) == Policy(threads=2, calls=2)


@pytest.mark.parametrize("threads", [1, 4])
def test_other_threads_work_while_the_only_call_runs(threads: int) -> None:
    assert choose("cpu", 1, threads=threads) == Policy(threads=3, calls=1, batch=True)
    assert choose("cpu", 1, Limits(threads=threads)) == Policy(threads=3, calls=1, batch=True)


def test_on_a_gpu_canvases_wait_for_others() -> None:
    policy = choose("cuda", 2)
    assert policy == Policy(threads=5, calls=2, batch=True, max_batch=8, max_delay_s=0.005)


def test_the_delay_and_the_batch_are_settings_and_the_model_bounds_the_batch() -> None:
    policy = choose("cpu", 2, Limits(max_batch=4), max_delay_ms=20)
    assert policy == Policy(threads=3, calls=2, batch=True, max_batch=4, max_delay_s=0.02)
    assert choose("cpu", 4, max_delay_ms=20).threads == 4
    assert choose("cuda", 1, Limits(max_batch=16), max_batch=2, max_delay_ms=0) == Policy(
        threads=4, calls=1, batch=True, max_batch=2
    )


@pytest.mark.parametrize(
    "wrong",
    [{"threads": 0}, {"calls": 0}, {"max_batch": 0}, {"helpers": -1}, {"max_delay_s": -0.1}],
)
def test_bounds_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Policy(**{"threads": 1, **wrong})


def test_unless_told_otherwise_there_is_one_call_of_one_canvas_without_delay() -> None:
    assert Policy(threads=1) == Policy(
        threads=1, helpers=0, calls=1, batch=False, max_batch=1, max_delay_s=0.0
    )
