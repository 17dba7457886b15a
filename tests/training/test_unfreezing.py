"""A backbone that is frozen in the first epochs of a run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny import TINY, TINY_SGD, build_tiny_data
from tests.support.trained import assert_same_run, build
from tests.training.test_trainer import Stop, interrupt_at
from training.configs.io import apply_overrides
from training.configs.schema import BackboneConfig, Config, ScheduleConfig
from training.data.coco import CocoDataset
from training.model.solo import Solo
from training.optim import BackboneFreeze
from training.rollback import Diverged
from training.trainer import Trainer
from training.weights.formats import load_checkpoint

FROZEN = 2  # epochs, each of one step
LITE = BackboneConfig(kind="efficientnet_lite0", base_width=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return CocoDataset(build_tiny_data(tmp_path_factory.mktemp("data")), "train")


def staged(config: Config, backbone: BackboneConfig | None = None) -> Config:
    """Five steps, the backbone frozen in the first two."""
    schedule = replace(config.schedule, epochs=5, frozen_backbone_epochs=FROZEN)
    model = replace(config.model, backbone=backbone or config.model.backbone)
    return replace(config, model=model, schedule=schedule)


def follow(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The network's state before the first step and after each."""
    states = [{k: v.clone() for k, v in trainer.model.state_dict().items()}]
    original = trainer.train_step

    def stepping(*batches: Any) -> dict[str, float]:
        numbers = original(*batches)
        states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        return numbers

    monkeypatch.setattr(trainer, "train_step", stepping)
    return states


def changed(before: dict[str, Tensor], after: dict[str, Tensor], part: str) -> set[str]:
    names = {key for key in before if key.startswith(part)}
    assert names
    return {key for key in names if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize(
    "config",
    [staged(TINY), staged(TINY_SGD, LITE)],
    ids=["batch norm, adamw", "efficientnet, frozen stage, sgd"],
)
def test_only_the_rest_of_the_network_changes_at_first(
    config: Config, data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(config, data, tmp_path)
    states = follow(trainer, monkeypatch)
    trainer.fit()
    assert len(states) == 6
    for step, (before, after) in enumerate(pairwise(states)):
        moved = changed(before, after, "backbone.")
        assert bool(moved) == (step >= FROZEN), (step, moved)
        assert changed(before, after, "head.") and changed(before, after, "neck.")
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    fresh = Solo(config.model, 2)
    assert trained == {n for n, p in fresh.named_parameters() if p.requires_grad}
    average = load_checkpoint(tmp_path / "last.pt")[1]["ema"]
    assert bool(average) == (config.schedule.ema_decay > 0)


@pytest.mark.parametrize(
    ("config", "stop"), [(staged(TINY), 1), (staged(TINY), 2), (staged(TINY_SGD), 3)]
)
def test_resuming_around_the_boundary_is_exact(
    config: Config, stop: int, data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = build(config, data, tmp_path / "a", checkpoint_every=1).fit()
    first = build(config, data, tmp_path / "b", checkpoint_every=1)
    interrupt_at(first, stop, monkeypatch)
    with pytest.raises(Stop):
        first.fit()
    second = build(config, data, tmp_path / "b", checkpoint_every=1)
    assert (second.step, second.freeze.frozen) == (stop, stop < FROZEN)
    assert_same_run(last, second.fit())


def test_a_rollback_over_the_boundary_freezes_again(
    data: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes back from step 3 to step 0, whose backbone is frozen."""
    trainer = build(staged(TINY), data, tmp_path, checkpoint_every=100)
    states = follow(trainer, monkeypatch)
    original = trainer.train_step
    failed: list[bool] = []

    def stepping(*batches: Any) -> dict[str, float]:
        if trainer.step == 3 and not failed:
            failed.append(True)
            raise Diverged("as if")
        return original(*batches)

    monkeypatch.setattr(trainer, "train_step", stepping)
    trainer.fit()
    again = states[4:]
    assert failed and len(again) == 5
    assert not changed(states[0], again[0], "backbone.")
    assert not changed(again[0], again[1], "backbone.") and changed(again[0], again[1], "head.")
    assert changed(again[1], again[2], "backbone.")


def test_frozen_parameters_have_no_optimizer_state(data: CocoDataset, tmp_path: Path) -> None:
    trainer = build(staged(TINY), data, tmp_path)
    held = {id(p) for p in trainer.freeze.parameters}
    steps = trainer.batches()
    for step in range(3):
        trainer.model.train()
        trainer.train_step(*next(steps))
        stored = {id(p) for p in trainer.optimizer.state}
        assert bool(stored & held) == (step >= FROZEN) and stored - held


def test_what_the_configuration_freezes_stays_frozen() -> None:
    config = staged(TINY, replace(TINY.model.backbone, frozen_stages=1))
    model = Solo(config.model, 2)
    freeze = BackboneFreeze(model, 4)
    model.train()
    assert freeze.apply(0) and not freeze.apply(3)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert [model.backbone.training, model.head.training] == [False, True]
    assert freeze.apply(4)
    assert [model.backbone.training, model.head.training] == [True, True]
    fixed = {n.split(".")[0] for n, p in model.backbone.named_parameters() if not p.requires_grad}
    assert fixed == {"conv1", "bn1", "layer1"}
    assert not BackboneFreeze(model, 0).apply(0)


@pytest.mark.parametrize("value", ["-1", "1.5"])
def test_the_number_of_epochs_is_checked(value: str) -> None:
    with pytest.raises(ValueError, match="frozen_backbone_epochs"):
        apply_overrides(TINY, [f"schedule.frozen_backbone_epochs={value}"])
    assert ScheduleConfig().frozen_backbone_epochs == 0
