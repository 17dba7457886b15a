from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import TINY, TINY_SGD, build_tiny_data
from tests.support.trained import assert_same_run, build, column, longer
from training.data.coco import CocoDataset
from training.optim import learning_rate
from training.rollback import Diverged
from training.termination import Terminated
from training.trainer import Trainer
from training.weights.formats import load_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return CocoDataset(build_tiny_data(tmp_path_factory.mktemp("data")), "train")


def test_a_loss_that_is_not_finite_stops_the_run(data: CocoDataset, tmp_path: Path) -> None:
    trainer = build(TINY, data, tmp_path)
    with torch.no_grad():
        trainer.model.head.category_out.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        trainer.fit()
    assert not (tmp_path / "last.pt").exists()


def poison(trainer: Trainer, step: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the loss of a step not finite, the first times that it is computed."""
    original, left = trainer._backward, [times]

    def backward(batches: Any) -> dict[str, float]:
        numbers = original(batches)
        if trainer.step == step and left[0] > 0:
            left[0] -= 1
            numbers["total"] = math.inf
        return numbers

    monkeypatch.setattr(trainer, "_backward", backward)


@pytest.mark.parametrize(("step", "to"), [(1, 0), (3, 2), (4, 2), (5, 4)])
def test_a_loss_that_is_not_finite_goes_back_with_half_the_rate(
    step: int, to: int, data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Step 4 fails from the checkpoint of step 4 itself, which may be the cause.
    config = longer(TINY_SGD, 6)
    trainer = build(config, data, tmp_path)
    poison(trainer, step, 1, monkeypatch)
    trainer.fit()
    rates = list(column(tmp_path, "lr").values())
    expected = [learning_rate(config.schedule, s, 1) for s in range(6)]
    assert rates == pytest.approx(expected[:to] + [rate / 2 for rate in expected[to:]], rel=1e-5)
    (note,) = [
        line for line in (tmp_path / "metrics.csv").read_text().splitlines() if ",note," in line
    ]
    assert note.startswith(f"{to},note,loss is inf at step {step}; went back to step {to} with")
    assert load_checkpoint(tmp_path / "last.pt")[1]["rollbacks"] == 1


def test_a_rollback_does_not_depend_on_where_a_run_was_stopped(
    data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name, stops in (("a", []), ("b", [3, 4]), ("c", [1, 2, 3])):
        for stop in stops:
            trainer = build(longer(TINY_SGD, 6), data, tmp_path / name)
            finish, wanted = trainer._finish_step, stop
            monkeypatch.setattr(
                trainer,
                "_finish_step",
                lambda log, t=trainer, f=finish, w=wanted: t._stop() if t.step == w else f(log),
            )
            with pytest.raises(Terminated, match=f"at step {stop}"):
                trainer.fit()
        trainer = build(longer(TINY_SGD, 6), data, tmp_path / name)
        poison(trainer, 3 if name == "c" else 4, 1, monkeypatch)
        results.append(trainer.fit())
    reference = build(longer(TINY_SGD, 6), data, tmp_path / "d")
    poison(reference, 3, 1, monkeypatch)
    assert_same_run(results[0], results[1])
    assert_same_run(results[2], reference.fit())


def test_rollbacks_are_bounded_and_another_rate_begins_anew(
    data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(longer(TINY_SGD, 6), data, tmp_path)
    poison(trainer, 3, 100, monkeypatch)
    with pytest.raises(
        Diverged, match=r"inf at step 3, .*halved 3 times; .*resume-with schedule.lr"
    ):
        trainer.fit()
    assert (tmp_path / "metrics.csv").read_text().count(",note,") == 3
    content = load_checkpoint(tmp_path / "last.pt")[1]
    assert (content["step"], content["rollbacks"]) == (2, 3)
    lower = replace(TINY_SGD, schedule=replace(TINY_SGD.schedule, epochs=6, lr=0.001))
    resumed = build(lower, data, tmp_path)
    assert resumed.rollbacks == 0
    resumed.fit()
    assert column(tmp_path, "lr")["3"] == pytest.approx(learning_rate(lower.schedule, 2, 1))


def test_a_gradient_that_is_not_finite_is_not_applied(data: CocoDataset, tmp_path: Path) -> None:
    trainer = build(TINY_SGD, data, tmp_path)
    weight = trainer.model.head.category_out.weight
    weight.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
    before = weight.detach().clone()
    with pytest.raises(Diverged, match="gradient norm is nan at step 0"):
        trainer.fit()
    assert torch.equal(weight, before)
