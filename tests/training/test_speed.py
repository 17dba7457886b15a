from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.support.tiny import TINY, build_tiny_data
from training import speed
from training.data.coco import CocoDataset
from training.data.loader import Batch
from training.run_options import RunOptions
from training.speed import MAX_IMAGES, STEPS, device_name, measure_fps, measure_step
from training.termination import Terminated
from training.trainer import Trainer


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    data = CocoDataset(build_tiny_data(tmp_path / "data"), "train")
    data.records = data.records * 8
    return Trainer(TINY, data, RunOptions(out=tmp_path / "run", workers=1), None)


def test_a_measurement_leaves_no_process_and_no_signal_handler(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert 0 < measure_step(trainer) < 300
    assert trainer.step == STEPS + 1
    assert multiprocessing.active_children() == []

    def fail(*batches: Batch) -> dict[str, float]:
        assert len(multiprocessing.active_children()) == 1
        raise ValueError("no memory")

    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(ValueError, match="no memory"):
        measure_step(trainer)
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("between", [False, True])
def test_sigterm_ends_a_measurement_in_a_step_and_between_steps(
    between: bool, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.train_step

    def signalled(*batches: Batch) -> dict[str, float]:
        numbers = step(*batches) if between else {}
        os.kill(os.getpid(), signal.SIGTERM)
        return numbers or step(*batches)

    monkeypatch.setattr(trainer, "train_step", signalled)
    with pytest.raises(Terminated, match="stopped by SIGTERM while a step was timed"):
        measure_step(trainer)
    assert trainer.step == between
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("received", "kind"), [(False, RuntimeError), (True, Terminated)])
def test_the_end_of_another_process_is_an_error_unless_it_follows_sigterm(
    received: bool, kind: type[Exception], trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*batches: Batch) -> dict[str, float]:
        trainer.termination.received = received
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("training.distributed.is_lost_peer", lambda error: True)
    monkeypatch.setattr(trainer, "train_step", lose)
    with pytest.raises(kind):
        measure_step(trainer)


def test_the_first_image_is_not_measured() -> None:
    seen: list[bytes] = []

    def predict(image: bytes) -> None:
        seen.append(image)
        time.sleep(0.5 if image == b"0" else 0.01)

    fps = measure_fps(predict, [b"0", b"1", b"2"])
    assert seen == [b"0", b"1", b"2"] and 5 < fps <= 100


def test_a_single_image_is_measured_the_second_time() -> None:
    seen: list[bytes] = []
    assert measure_fps(seen.append, [b"0"]) > 0 and seen == [b"0", b"0"]


def test_the_measurement_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    measure_fps(seen.append, [b"0"] * (10 * MAX_IMAGES))
    assert len(seen) == MAX_IMAGES + 1
    monkeypatch.setattr(speed, "MAX_SECONDS", -1.0)
    seen.clear()
    measure_fps(seen.append, [b"0"] * 10)
    assert len(seen) == 2


def test_a_cpu_is_named_with_its_threads() -> None:
    assert device_name("cpu") == f"CPU ({torch.get_num_threads()} threads)"
