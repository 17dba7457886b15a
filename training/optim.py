"""Learning rate, optimizer, frozen weights and averaged weights."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from training.configs.schema import Config, ScheduleConfig
from training.model.solo import Solo


def scale_learning_rate(config: Config, reference_batch: int) -> Config:
    """The linear rule ("Accurate, Large Minibatch SGD", arXiv 1706.02677, section 2.1).

    Args:
        config: Its learning rate is that for `reference_batch` images per step.
        reference_batch: Usually the batch size of the zoo's configuration.

    Returns:
        The configuration with the rate multiplied by batch size / reference batch.
    """
    schedule = config.schedule
    lr = schedule.lr * schedule.batch_size / reference_batch
    return replace(config, schedule=replace(schedule, lr=lr))


def learning_rate(schedule: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step: linear warm-up, then step decay by ten or cosine decay to zero."""
    total = schedule.epochs * steps_per_epoch
    rate = schedule.lr
    if schedule.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))
    else:
        rate *= 0.1 ** sum(step >= m * steps_per_epoch for m in schedule.milestones)
    if step < schedule.warmup_steps:
        done = step / schedule.warmup_steps
        rate *= schedule.warmup_ratio + (1 - schedule.warmup_ratio) * done
    return rate


def build_optimizer(model: Solo, schedule: ScheduleConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, which decays only weights of two or more dimensions."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(
            trained, schedule.lr, schedule.momentum, weight_decay=schedule.weight_decay
        )
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, schedule.lr, betas=(schedule.momentum, 0.999))


class BackboneFreeze:
    """Freezes a network's backbone for the first steps of a run.

    Its parameters then get no gradient, so neither momentum nor weight decay changes them, and its
    batch norm keeps its statistics.

    Args:
        model: The network; what its configuration freezes stays frozen.
        steps: Number of steps.
    """

    def __init__(self, model: Solo, steps: int) -> None:
        self.model, self.steps = model, steps
        self.parameters = [p for p in model.backbone.parameters() if p.requires_grad]
        self.frozen = False

    def apply(self, step: int) -> bool:
        """Sets the state of a step; whether it is another one than before."""
        changes = self.frozen != (step < self.steps)
        if changes:
            self.frozen = not self.frozen
            for parameter in self.parameters:
                parameter.requires_grad_(not self.frozen)
        self.model.backbone.train(self.model.training and not self.frozen)
        return changes


class MovingAverage:
    """Exponential moving average of a model's state, warmed up over the first steps."""

    def __init__(self, model: Solo, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copies a stored average into this one, which stays on its device."""
        for key, value in self.state.items():
            value.copy_(state[key])

    @torch.no_grad()
    def update(self, model: Solo, step: int) -> None:
        """Updates the average with the model's current state; integer entries are copied."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - decay)
            else:
                self.state[key].copy_(value)
