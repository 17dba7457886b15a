from __future__ import annotations

import csv
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny import TINY, TINY_SGD, build_tiny_data
from tests.support.trained import assert_same_run, build, column, longer
from training.configs import get_config
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.data.loader import build_loader
from training.model.solo import Solo
from training.run_log import RunLog
from training.termination import Terminated
from training.trainer import Trainer
from training.weights.formats import CheckpointError, load_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return CocoDataset(build_tiny_data(tmp_path_factory.mktemp("data")), "train")


def test_copies_to_the_device_do_not_wait(
    data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(TINY, data, tmp_path)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    (step,) = itertools.islice(trainer.batches(), 1)
    batches = [batch.pin_memory() for batch in step]
    levels = [level for batch in batches for image in batch.targets for level in image]
    loaded = {batch.images.data_ptr() for batch in batches}
    loaded |= {batch.valid_hw.data_ptr() for batch in batches}
    arrays = [value for level in levels for value in vars(level).values() if value is not None]
    loaded |= {array.ctypes.data for array in arrays if array.size}
    sent: dict[int, bool] = {}
    send = Tensor.to

    def record(tensor: Tensor, *target: Any, **how: Any) -> Tensor:
        if target and isinstance(target[0], str | torch.device):
            sent[tensor.data_ptr()] = how.get("non_blocking", False)
        return send(tensor, *target, **how)

    monkeypatch.setattr(Tensor, "to", record)
    losses = trainer.train_step(*batches)
    assert losses["num_positives"] > 0
    assert {address: sent.get(address) for address in loaded} == dict.fromkeys(loaded, True)


class Stop(Exception):
    pass


def interrupt_at(trainer: Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer.train_step

    def stepping(*batches: Any) -> dict[str, float]:
        if trainer.step == step:
            raise Stop
        return original(*batches)

    monkeypatch.setattr(trainer, "train_step", stepping)


@pytest.mark.parametrize("config", [longer(TINY, 5), longer(TINY_SGD, 5)], ids=["adamw", "sgd"])
def test_stop_and_resume_is_bit_identical_to_an_unbroken_run(
    config: Config, data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = build(config, data, tmp_path / "a")
    assert unbroken.total_steps == 5
    last = unbroken.fit()
    first = build(config, data, tmp_path / "b")
    interrupt_at(first, 3, monkeypatch)
    with pytest.raises(Stop):
        first.fit()
    assert load_checkpoint(tmp_path / "b" / "last.pt")[1]["step"] == 2
    second = build(config, data, tmp_path / "b")
    assert second.step == 2 and second.seconds > 0
    assert_same_run(last, second.fit())
    content = load_checkpoint(last)[1]
    assert content["step"] == 5
    assert bool(content["ema"]) == (config.schedule.ema_decay > 0)
    # The logs tell the same story and no step stands there twice.
    rows = {}
    for name in "ab":
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            rows[name] = [row for row in csv.reader(file) if row[1] != "seconds"]
        keys = [(step, key) for step, key, _ in rows[name]]
        assert len(set(keys)) == len(keys)
    assert rows["a"] == rows["b"]
    assert {step for step, *_ in rows["a"][1:]} == {"1", "2", "3", "4", "5"}


def test_a_seed_makes_a_run_repeatable_and_another_one_differs(
    data: CocoDataset, tmp_path: Path
) -> None:
    config = longer(TINY, 2)
    runs = [
        build(config, data, tmp_path / name, seed=seed).fit()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert_same_run(runs[0], runs[1])
    weights = [load_checkpoint(run)[1]["model"]["head.category_out.weight"] for run in runs]
    assert not torch.equal(weights[0], weights[2])


def test_the_time_limit_stops_with_a_checkpoint(data: CocoDataset, tmp_path: Path) -> None:
    calls = []

    def validate(model: Solo, config: Config) -> dict[str, float]:
        calls.append(model.training)
        return {"AP": 0.5}

    trainer = build(
        longer(TINY, 50), data, tmp_path, validate, max_seconds=0.0, checkpoint_every=100
    )
    trainer.fit()
    assert load_checkpoint(tmp_path / "last.pt")[1]["step"] == 1
    assert load_checkpoint(tmp_path / "best.pt")[1]["best"] == 0.5
    assert calls == [False]


def test_an_interrupted_step_leaves_the_state_before_it(
    data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGTERM)  # another library's, where one has set it
    unbroken = build(longer(TINY, 4), data, tmp_path / "a").fit()
    trainer = build(longer(TINY, 4), data, tmp_path / "b")
    weight = trainer.model.head.category_out.weight

    def interrupt(gradient: Tensor) -> None:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    weight.register_hook(interrupt)  # type: ignore[no-untyped-call]
    original, finished = trainer._backward, []

    def backward(batches: Any) -> dict[str, float]:
        numbers = original(batches)
        finished.append(trainer.step)
        return numbers

    monkeypatch.setattr(trainer, "_backward", backward)
    with pytest.raises(Terminated, match="at step 2"):
        trainer.fit()
    assert finished == [0, 1]  # the third backward pass did not end
    assert signal.getsignal(signal.SIGTERM) == handler
    assert_same_run(unbroken, build(longer(TINY, 4), data, tmp_path / "b").fit())


def test_an_interrupted_validation_is_repeated(data: CocoDataset, tmp_path: Path) -> None:
    steps: list[int] = []

    def interrupted(model: Solo, config: Config) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError("SIGTERM waited for the validation")

    def validate(model: Solo, config: Config) -> dict[str, float]:
        steps.append(resumed.step)
        return {"AP": 0.5}

    with pytest.raises(Terminated, match="at step 1"):
        build(longer(TINY, 2), data, tmp_path, interrupted, validate_every=1).fit()
    resumed = build(longer(TINY, 2), data, tmp_path, validate, validate_every=1)
    resumed.fit()
    assert steps == [1, 2]
    assert load_checkpoint(tmp_path / "best.pt")[1]["step"] == 1


def test_another_configuration_is_refused_by_the_names_of_the_fields(
    data: CocoDataset, tmp_path: Path
) -> None:
    build(longer(TINY, 1), data, tmp_path).fit()
    other = replace(longer(TINY, 2), name="other", model=replace(TINY.model, candidates=21))
    with pytest.raises(
        CheckpointError,
        match=r'last\.pt was trained with another configuration: name "other" \(was "tiny"\); '
        r"model\.candidates 21 \(was 20\)\. A resumed run may change .*schedule\.epochs",
    ):
        build(other, data, tmp_path)
    assert build(other, data, tmp_path, resume=False).step == 0
    with pytest.raises(CheckpointError, match=r"--seed 1 \(was 0\)"):
        build(longer(TINY, 1), data, tmp_path, seed=1)


def test_a_run_goes_on_with_more_epochs_and_another_rate(
    data: CocoDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # With a constant rate the resumed run is the one that had two epochs from the start.
    schedule = replace(TINY_SGD.schedule, milestones=(9,), warmup_steps=0)
    config = replace(TINY_SGD, schedule=schedule)
    build(longer(config, 1), data, tmp_path / "a").fit()
    resumed = build(longer(config, 2), data, tmp_path / "a")
    assert resumed.step == 1 and resumed.total_steps == 2
    assert_same_run(resumed.fit(), build(longer(config, 2), data, tmp_path / "b").fit())
    assert "step 1: resumed with schedule.epochs 2 (was 1)" in capsys.readouterr().out
    faster = replace(config, schedule=replace(schedule, epochs=3, lr=0.5))
    build(faster, data, tmp_path / "a").fit()
    assert column(tmp_path / "a", "lr") == {"1": 0.01, "2": 0.01, "3": 0.5}
    build(faster, data, tmp_path / "a").fit()
    assert (tmp_path / "a" / "metrics.csv").read_text().count("note,") == 2
    with pytest.raises(
        CheckpointError, match="at step 3, after the last of the changed schedule: 2"
    ):
        build(longer(config, 2), data, tmp_path / "a")


def test_a_finished_run_stays_as_it_is(data: CocoDataset, tmp_path: Path) -> None:
    config = longer(TINY, 1)
    before = load_checkpoint(build(config, data, tmp_path).fit())[1]
    again = build(config, data, tmp_path)
    assert again.step == again.total_steps
    after = load_checkpoint(again.fit())[1]
    assert all(torch.equal(v, after["model"][k]) for k, v in before["model"].items())


def test_validation_keeps_the_best(data: CocoDataset, tmp_path: Path) -> None:
    scores = iter([0.2, 0.4, 0.3])
    trainer = build(
        longer(TINY, 3),
        data,
        tmp_path,
        lambda model, config: {"AP": next(scores)},
        validate_every=1,
    )
    trainer.fit()
    best, last = (load_checkpoint(tmp_path / f"{n}.pt")[1] for n in ("best", "last"))
    assert (best["step"], best["best"]) == (2, 0.4)
    assert (last["step"], last["best"]) == (3, 0.4)
    assert column(tmp_path, "val/AP") == {"1": 0.2, "2": 0.4, "3": 0.3}


def test_validation_without_objects_keeps_a_best(data: CocoDataset, tmp_path: Path) -> None:
    build(longer(TINY, 1), data, tmp_path, lambda model, config: {"AP": -1.0}).fit()
    assert load_checkpoint(tmp_path / "best.pt")[1]["best"] == -1


def test_training_goes_on_in_training_mode_after_a_validation(
    data: CocoDataset, tmp_path: Path
) -> None:
    modes = []

    def validate(model: Solo, config: Config) -> dict[str, float]:
        model.eval()
        return {"AP": 0.0}

    trainer = build(longer(TINY, 2), data, tmp_path, validate, validate_every=1)
    original = trainer.train_step
    trainer.train_step = lambda *batches: (  # type: ignore[method-assign]
        modes.append(trainer.model.training) or original(*batches)  # type: ignore[func-returns-value]
    )
    trainer.fit()
    assert modes == [True, True]


def test_tensorboard_gets_the_numbers(data: CocoDataset, tmp_path: Path) -> None:
    build(longer(TINY, 1), data, tmp_path).fit()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_images_without_objects_train(tmp_path: Path) -> None:
    root = build_tiny_data(tmp_path / "data")
    split = CocoDataset(root, "train")
    split.records = split.records[2:]
    assert split.records[0].annotations == ()
    trainer = build(longer(TINY, 1), split, tmp_path / "run")
    batch = next(iter(_batches(trainer)))
    numbers = trainer.train_step(batch)
    assert numbers["mask"] == 0 and numbers["num_positives"] == 0
    assert math.isfinite(numbers["total"]) and math.isfinite(numbers["grad_norm"])


def test_images_without_objects_are_left_out_if_the_configuration_says_so(
    data: CocoDataset, tmp_path: Path
) -> None:
    assert len(build(TINY, data, tmp_path).data) == 3
    schedule = replace(TINY.schedule, skip_empty_images=True)
    trainer = build(replace(TINY, schedule=schedule), data, tmp_path)
    assert [len(r.objects) for r in trainer.data.records] == [2, 2]
    assert trainer.steps_per_epoch == max(1, 2 // TINY.schedule.batch_size)
    assert get_config("solo_r50").schedule.skip_empty_images
    assert get_config("solo_512_r50").schedule.skip_empty_images
    assert not get_config("nuclei").schedule.skip_empty_images


def test_images_of_rare_classes_are_repeated_if_the_configuration_says_so(
    data: CocoDataset, tmp_path: Path
) -> None:
    data.records = [replace(data.records[0], image_id=n) for n in range(9)]
    (first, *others) = data.records
    data.records = [first, *(replace(r, objects=r.objects[:1]) for r in others)]
    schedule = replace(TINY.schedule, repeat_below=1.0)
    trainer = build(replace(TINY, schedule=schedule), data, tmp_path)
    assert [r.image_id for r in trainer.data.records] == [0, 0, 0, *range(1, 9)]
    assert trainer.steps_per_epoch == 11 // TINY.schedule.batch_size
    assert get_config("facades").schedule.repeat_below > 0


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_of_images_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match=f"repeat_below is {share}, expected 0 to 1"):
        replace(TINY.schedule, repeat_below=share)


def _batches(trainer: Trainer) -> Any:
    return build_loader(trainer.data, trainer.config, seed=0, start_step=0, stop_step=1, workers=0)


CRASH = """
import sys
from pathlib import Path
from dataclasses import replace
from tests.support.tiny import TINY
from training.data.coco import CocoDataset
from training.data.loader import build_loader
from training.run_options import RunOptions
from training.trainer import Trainer
config = replace(TINY, schedule=replace(TINY.schedule, epochs=100000))
data = CocoDataset(Path(sys.argv[1]), "train")
options = RunOptions(out=Path(sys.argv[2]), workers=0, checkpoint_every=1, log_every=1)
Trainer(config, data, options, None).fit()
"""


def test_a_killed_run_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    root, out = build_tiny_data(tmp_path / "data"), tmp_path / "run"
    command = [sys.executable, "-c", CRASH, str(root), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while not (out / "last.pt").exists() and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    content = load_checkpoint(out / "last.pt")[1]
    assert content["step"] >= 1
    config = longer(TINY, 100000)
    resumed = build(config, CocoDataset(root, "train"), out)
    assert resumed.step == content["step"]
    with RunLog(out, resumed.step) as log:
        log.write(resumed.step + 1, {"total": 1.0})
    with (out / "metrics.csv").open(newline="") as file:
        steps = [int(row[0]) for row in list(csv.reader(file))[1:]]
    assert max(steps) == resumed.step + 1


def test_gradients_are_clipped(data: CocoDataset, tmp_path: Path) -> None:
    schedule = replace(TINY_SGD.schedule, clip_norm=1e-3, momentum=0.0, weight_decay=0.0)
    config = replace(TINY_SGD, schedule=replace(schedule, warmup_steps=0, lr=1.0))
    trainer = build(config, data, tmp_path)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    numbers = trainer.train_step(next(iter(_batches(trainer))))
    assert numbers["grad_norm"] > 1e-3
    moved = [(a - b).detach() for a, b in zip(trainer.model.parameters(), before, strict=True)]
    norm = math.sqrt(sum((m.double() ** 2).sum().item() for m in moved))
    assert norm == pytest.approx(1e-3, rel=0.02)
