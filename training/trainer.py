"""The training loop: one step after another, resumable at any checkpoint, bit for bit."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from training.configs.schema import Config, ScheduleConfig
from training.criterion import solo_loss
from training.data.coco import CocoDataset
from training.data.loader import Batch, build_loader
from training.model.solo import Solo

Validate = Callable[[Solo, Config], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is carried out; what it computes is in `Config`.

    Attributes:
        out: Folder of checkpoints, metrics.csv and TensorBoard events.
        seed: Seed of initialisation, order and augmentation.
        checkpoint_every: Steps between checkpoints.
        validate_every: Epochs between validations, 0 for none but the last.
        max_seconds: Stop cleanly with a checkpoint after this long; None: never.
        resume: Go on from `out/last.pt` if it is there.
    """

    out: Path
    seed: int = 0
    workers: int = 1
    device: str = "cpu"
    checkpoint_every: int = 200
    validate_every: int = 5
    log_every: int = 10
    max_seconds: float | None = None
    resume: bool = True


def learning_rate(schedule: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
    """Rate of a step: linear warm-up, then steps of a tenth or a cosine to zero."""
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
    """SGD with momentum on everything that trains; AdamW decays matrices only."""
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


class MovingAverage:
    """Exponential moving average of a model's state, warmed up over the first steps."""

    def __init__(self, model: Solo, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over a stored average, on the device of this one."""
        for key, value in self.state.items():
            value.copy_(state[key])

    @torch.no_grad()
    def update(self, model: Solo, step: int) -> None:
        """Moves towards the model's present state; counters are copied."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - decay)
            else:
                self.state[key].copy_(value)


class Trainer:
    """Trains one configuration on one data set.

    Args:
        config: What to train; `classes` and `num_classes` are the data set's.
        data: The training split.
        options: Where, how long, which seed.
        validate: Called with the (averaged) model; its numbers go to the log. May be None.

    Raises:
        CheckpointError: `out/last.pt` belongs to another configuration.
    """

    def __init__(
        self, config: Config, data: CocoDataset, options: RunOptions, validate: Validate | None
    ) -> None:
        torch.manual_seed(options.seed)
        self.config, self.data, self.options, self.validate = config, data, options, validate
        self.model = Solo(config.model, config.num_classes).to(options.device)
        self.optimizer = build_optimizer(self.model, config.schedule)
        decay = config.schedule.ema_decay
        self.average = MovingAverage(self.model, decay) if decay > 0 else None
        self.steps_per_epoch = max(1, len(data) // config.schedule.batch_size)
        self.total_steps = config.schedule.epochs * self.steps_per_epoch
        self.step = 0
        self.seconds = 0.0
        self.best = -1.0
        if options.resume and (options.out / "last.pt").exists():
            self._resume(options.out / "last.pt")

    def _resume(self, path: Path) -> None:
        config, content = load_checkpoint(path)
        if config != self.config:
            raise CheckpointError(
                f"{path} was trained with another configuration; choose another folder"
            )
        load_weights(self.model, content["model"], str(path))
        self.optimizer.load_state_dict(content["optimizer"])
        if self.average is not None:
            self.average.load(content["ema"])
        self.step, self.seconds = content["step"], content["seconds"]
        self.best = content["best"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the configuration."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.average.state if self.average is not None else {},
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
        }

    def save(self, name: str = "last.pt") -> Path:
        """Writes `out/name`."""
        path = self.options.out / name
        save_checkpoint(path, self.config, self.state())
        return path

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Forward, backward, update; returns the losses, the rate and the gradients' norm.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        schedule = self.config.schedule
        rate = learning_rate(schedule, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = self.options.device
        x = self.model.normalise(batch.images.to(device), batch.valid_hw.to(device))
        losses = solo_loss(self.model, self.model(x), batch.targets, self.config.loss)
        if not torch.isfinite(losses["total"]):
            raise FloatingPointError(f"loss is {losses['total'].item()} at step {self.step}")
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()  # type: ignore[no-untyped-call]
        bound = schedule.clip_norm if schedule.clip_norm is not None else math.inf
        norm: Tensor = torch.nn.utils.clip_grad_norm_(self.model.parameters(), bound)
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            self.average.update(self.model, self.step)
        return {**{k: v.item() for k, v in losses.items()}, "lr": rate, "grad_norm": norm.item()}

    def averaged_model(self) -> Solo:
        """A copy in evaluation mode with the averaged weights (the plain ones without EMA)."""
        model = Solo(self.config.model, self.config.num_classes).to(self.options.device)
        model.load_state_dict(self.average.state if self.average else self.model.state_dict())
        return model.eval()

    def fit(self) -> Path:
        """Trains to the end of the schedule or of the time; returns the last checkpoint."""
        options = self.options
        options.out.mkdir(parents=True, exist_ok=True)
        loader = build_loader(
            self.data,
            self.config,
            seed=options.seed,
            start_step=self.step,
            stop_step=self.total_steps,
            workers=options.workers,
        )
        started, before = time.monotonic(), self.seconds
        self.model.train()
        bar = tqdm(loader, initial=self.step, total=self.total_steps, unit="step")
        with RunLog(options.out, self.step) as log, bar:
            for batch in bar:
                numbers = self.train_step(batch)
                self.seconds = before + time.monotonic() - started
                if self.step % options.log_every == 0:
                    log.write(self.step, {**numbers, "seconds": self.seconds})
                    bar.set_postfix(loss=f"{numbers['total']:.3f}", mask=f"{numbers['mask']:.3f}")
                if self.step % options.checkpoint_every == 0:
                    self.save()
                late = options.max_seconds is not None and self.seconds > options.max_seconds
                if late or self._validation_due():
                    self._validate(log)
                if late:
                    break
        return self.save()

    def _validation_due(self) -> bool:
        if self.step == self.total_steps:
            return True
        every = self.options.validate_every * self.steps_per_epoch
        return every > 0 and self.step % every == 0

    def _validate(self, log: RunLog) -> None:
        if self.validate is None:
            return
        numbers = self.validate(self.averaged_model(), self.config)
        log.write(self.step, {f"val/{k}": v for k, v in numbers.items()})
        tqdm.write(f"step {self.step}: " + " ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        if numbers["AP"] > self.best:
            self.best = numbers["AP"]
            self.save("best.pt")


class RunLog:
    """Numbers of a run, to metrics.csv (step, name, value) and to TensorBoard.

    A resumed run drops the rows past its checkpoint, so that no step stands there twice.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "metrics.csv"
        kept: list[list[str]] = [["step", "name", "value"]]
        if step > 0 and path.exists():
            with path.open(newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == 3]
                kept += [row for row in rows if int(row[0]) <= step]
        self._file = path.open("w", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerows(kept)
        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Appends one row a number."""
        for name, value in numbers.items():
            self._csv.writerow([step, name, f"{value:.6g}"])
            self._board.add_scalar(name, value, step)
        self._file.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()
