from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.tiny import TINY
from training.configs.schema import ScheduleConfig
from training.model.solo import Solo
from training.optim import MovingAverage, build_optimizer, learning_rate


def test_step_schedule() -> None:
    schedule = ScheduleConfig(lr=1.0, epochs=10, milestones=(4, 8), warmup_steps=5)
    rates = [learning_rate(schedule, step, 10) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[:6] == sorted(rates[:6]) and rates[5] == 1.0
    assert rates[39] == 1.0
    assert rates[40] == pytest.approx(0.1) and rates[79] == pytest.approx(0.1)
    assert rates[80] == pytest.approx(0.01)


def test_cosine_schedule() -> None:
    schedule = ScheduleConfig(schedule="cosine", lr=2.0, epochs=10, warmup_steps=0)
    rates = [learning_rate(schedule, step, 10) for step in range(101)]
    assert rates[0] == 2 and rates[50] == pytest.approx(1) and rates[100] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_only_what_trains_is_optimised() -> None:
    frozen = replace(
        TINY.model, backbone=replace(TINY.model.backbone, norm="frozen_bn", frozen_stages=1)
    )
    model = Solo(frozen, 2)
    sgd = build_optimizer(model, ScheduleConfig())
    count = sum(len(g["params"]) for g in sgd.param_groups)
    assert count == sum(p.requires_grad for p in model.parameters())
    assert count < len(list(model.parameters()))
    adamw = build_optimizer(model, TINY.schedule)
    decayed, plain = adamw.param_groups
    assert decayed["weight_decay"] == TINY.schedule.weight_decay and plain["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim <= 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == count


def test_moving_average_by_hand() -> None:
    model = Solo(TINY.model, 2)
    average = MovingAverage(model, 0.9)
    key = "head.category_out.bias"
    expected = average.state[key].clone()
    for step in range(1, 30):
        with torch.no_grad():
            model.state_dict()[key].add_(0.1)
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.state_dict()[key]
    torch.testing.assert_close(average.state[key], expected)
    assert average.state["backbone.bn1.num_batches_tracked"].dtype == torch.int64
