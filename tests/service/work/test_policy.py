"""How an engine is used: by device, concurrency, threads and delay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.canvases import choose_canvases
from pipeline.model_config import Limits, ModelConfig
from service.engines.watch import WatchedEngine
from service.settings import Settings
from service.work.policy import Policy, choose_policy
from tests.service.engines.test_ort_session import read_config
from tests.support.blob_model import KEEP_RATIO_INPUT
from tests.support.canvases import FakeEngine


def choose(
    device: str,
    concurrency: int,
    limits: Limits | None = None,
    config: ModelConfig | None = None,
    **settings: Any,
) -> Policy:
    engine = FakeEngine(concurrency)
    engine.device = device
    watched = WatchedEngine(engine, lambda backend: None, timeout_s=1)
    given = {"threads": 4, "pool_threads": 3, **settings}
    config = config or read_config(limits=(limits or Limits()).model_dump())
    return choose_policy(Settings(**given), watched, config)


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


def test_only_on_a_gpu_canvases_are_padded_to_those_of_the_model() -> None:
    plain = read_config(input=KEEP_RATIO_INPUT)
    config = plain.model_copy(update={"canvases": choose_canvases(plain.input)})
    assert len(config.canvases) > 1
    assert choose("cuda", 2, config=config).canvases == config.canvases
    assert choose("cuda", 2, config=plain).canvases == ()
    assert choose("cpu", 2, config=config, max_delay_ms=5).canvases == ()
    assert choose("cpu", 1, config=config).canvases == ()


def test_several_canvases_need_more_of_them_ahead() -> None:
    policy = Policy(threads=18, calls=2, batch=True, max_batch=16)
    assert (policy.max_ahead, policy.max_pinned) == (64, 64)
    several = replace(policy, canvases=((32, 64), (64, 32)))
    assert (several.max_ahead, several.max_pinned) == (128, 64)
    assert replace(policy, canvases=((32, 64),)).max_ahead == 64


def test_small_batches_keep_no_thread_from_post_processing() -> None:
    assert Policy(threads=8, calls=1, batch=True, max_batch=1).max_pinned == 9
