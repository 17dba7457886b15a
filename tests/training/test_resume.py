"""Differences of configurations, and which of them a resumed run may have."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from pipeline.model_config import ClassSpec
from tests.support.tiny import TINY, TINY_SGD
from training.configs.schema import Config
from training.resume import Change, find_changes, is_changeable, require_resumable
from training.weights.formats import CheckpointError


def check(changes: list[Change], step: int = 5, seed: int = 0) -> None:
    require_resumable(changes, "a/last.pt", {"step": step, "seed": 0}, seed, total_steps=8)


def test_equal_configurations_have_no_changes() -> None:
    assert find_changes(TINY, replace(TINY)) == []
    check([])


def test_every_difference_is_named_by_its_path() -> None:
    other = replace(TINY, schedule=replace(TINY.schedule, lr=1.0, milestones=(4, 5)))
    found = {c.field: (c.old, c.new) for c in find_changes(TINY, other)}
    assert found == {"schedule.lr": (1e-3, 1.0), "schedule.milestones": ([27, 33], [4, 5])}
    check(find_changes(TINY, other))
    kinds = {c.field for c in find_changes(TINY, TINY_SGD)}
    assert {"model.head.kind", "input.resize.long_side"} <= kinds


@pytest.mark.parametrize("field", ["augment", "augment.flip", "loss.mask_loss", "schedule.lr"])
def test_changeable(field: str) -> None:
    assert is_changeable(field)


@pytest.mark.parametrize("field", ["", "name", "schedule", "augments", "model.head", "classes"])
def test_not_changeable(field: str) -> None:
    assert not is_changeable(field)


def test_what_the_state_depends_on_is_refused() -> None:
    schedule = replace(TINY.schedule, epochs=9, batch_size=4, optimizer="sgd", ema_decay=0.5)
    with pytest.raises(CheckpointError) as caught:
        check(find_changes(TINY, replace(TINY, schedule=schedule)))
    text = str(caught.value)
    assert text.startswith("a/last.pt was trained with another configuration: schedule.optimizer ")
    assert 'schedule.optimizer "sgd" (was "adamw")' in text
    assert "batch_size 4 (was 2)" in text and "epochs 9" not in text


def test_another_seed_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"--seed 3 \(was 0\)"):
        check([], seed=3)
    require_resumable([], "x", {"step": 5}, 3, 8)  # a checkpoint of before the seed was stored


def test_a_schedule_that_has_ended_is_refused() -> None:
    fewer = [Change("schedule.epochs", 12, 4)]
    check(fewer, step=8)
    with pytest.raises(CheckpointError, match=r"step 9, after the last of the changed schedule: 8"):
        check(fewer, step=9)
    check([], step=9)


def test_a_message_stays_short() -> None:
    many = tuple(ClassSpec(category_id=i, name=f"class {i}") for i in range(500))
    other = replace(
        TINY, name="n", classes=many, num_classes=500, model=TINY_SGD.model, input=TINY_SGD.input
    )
    with pytest.raises(CheckpointError, match=r"; .* and \d+ more\. A resumed") as caught:
        check(find_changes(TINY, other))
    assert len(str(caught.value)) < 1200


def test_every_section_of_a_configuration_is_decided_upon() -> None:
    decided = {"description": True, "augment": True, "loss": True, "postprocess": True}
    for field in fields(Config):
        assert is_changeable(field.name) == decided.get(field.name, False), field.name
