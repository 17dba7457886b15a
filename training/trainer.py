"""The training loop; a run that is resumed from a checkpoint gives bit-identical weights.

A step can be split over several processes (`training.distributed`) and several forward passes. The
loss is normalised by the positive cells of the whole step and gradients are summed, so splitting
changes only the order of summation. The exception is plain batch norm, whose statistics are those
of one forward pass, on GPUs over all processes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from training import distributed
from training.coco_metrics import describe_metrics
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.data.loader import Batch, build_loader
from training.data.sampling import plan_share
from training.model.solo import Solo
from training.network import build_network, build_objective
from training.optim import BackboneFreeze, MovingAverage, build_optimizer, learning_rate
from training.report import Picture, Pictures, describe_left, write_report
from training.resume import Change, find_changes, require_resumable
from training.rollback import (
    MOST,
    ROLLBACK_FILE,
    Diverged,
    Rollback,
    describe_rollback,
    give_up,
)
from training.run_folder import BEST_FILE
from training.run_log import RunLog
from training.run_options import RunOptions
from training.termination import Interrupted, Terminated, TerminationRequest, interrupt_backward
from training.weights.formats import load_checkpoint, load_weights, save_checkpoint

Validate = Callable[[Solo, Config], dict[str, float]]


class Trainer:
    """Trains one configuration on one data set.

    Args:
        config: The configuration, with `classes` and `num_classes` of the data set.
        data: The training split.
        options: How the run is executed.
        validate: Called with the (averaged) model; its metrics are logged. None: no validation.
        pictures: Draws predictions for report.html after each validation. None: no pictures.

    Raises:
        CheckpointError: `out/last.pt` has a configuration or a seed that a resumed run cannot
            change.
        ValueError: The batch cannot be split over the processes, or an option has a wrong value.
    """

    def __init__(
        self,
        config: Config,
        data: CocoDataset,
        options: RunOptions,
        validate: Validate | None,
        pictures: Pictures | None = None,
    ) -> None:
        torch.manual_seed(options.seed)
        if config.schedule.skip_empty_images:
            data = data.with_objects()
        if config.schedule.repeat_below:
            data = data.with_repeats(config.schedule.repeat_below)
        self.config, self.data, self.options, self.validate = config, data, options, validate
        self.pictures = pictures
        self.share = plan_share(
            config,
            rank=distributed.rank(),
            processes=distributed.world_size(),
            accumulate=options.accumulate,
        )
        self.model = build_network(config, options, self.share.processes)
        resumes = options.resume and (options.out / "last.pt").exists()
        if options.init is not None and not resumes:
            options.init(self.model)
        self.optimizer = build_optimizer(self.model, config.schedule)
        decay = config.schedule.ema_decay
        self.average = MovingAverage(self.model, decay) if decay > 0 else None
        self.steps_per_epoch = max(1, len(data) // config.schedule.batch_size)
        self.total_steps = config.schedule.epochs * self.steps_per_epoch
        device_type = torch.device(options.device).type
        self.scaler = torch.amp.GradScaler(device_type, enabled=options.precision == "fp16")
        self.step = 0
        self.seconds = 0.0
        self.best = -math.inf
        self.rollbacks = 0
        self.unvalidated = False
        self._started = time.monotonic(), 0
        self.termination = TerminationRequest(
            distributed.shared_store(), self.share.processes, self.share.rank
        )
        # A process that leaves in the middle of a step ends the wait of the others on the CPU
        # (gloo), but not on GPUs (NCCL): these stop between steps.
        self._steps_interruptible = self.share.processes == 1 or device_type == "cpu"
        self.rollback = Rollback(options.out, options.checkpoint_every)
        self.changes: list[Change] = []
        if resumes:
            self._resume(options.out / "last.pt")
        if torch.device(options.device).type == "cpu" and not options.compile:
            interrupt_backward(self.model)
        frozen_steps = config.schedule.frozen_backbone_epochs * self.steps_per_epoch
        self.freeze = BackboneFreeze(self.model, frozen_steps)
        self.freeze.apply(self.step)
        self.objective = build_objective(self.model, config, options)

    def _resume(self, path: Path) -> None:
        config, content = load_checkpoint(path)
        self.changes = find_changes(config, self.config)
        require_resumable(self.changes, str(path), content, self.options.seed, self.total_steps)
        self._restore(content, path)
        self.seconds, self.best = content["seconds"], content["best"]
        self.unvalidated = content.get("unvalidated", False)
        if any(change.field == "schedule.lr" for change in self.changes):
            self.rollbacks = 0

    def _restore(self, content: dict[str, Any], path: Path) -> None:
        """Sets what a step changes to the state in a checkpoint."""
        load_weights(self.model, content["model"], str(path))
        self.optimizer.load_state_dict(content["optimizer"])
        if self.average is not None:
            self.average.load(content["ema"])
        self.scaler.load_state_dict(content.get("scaler") or self.scaler.state_dict())
        self.step = content["step"]
        self.rollbacks = content.get("rollbacks", 0)

    def state(self) -> dict[str, Any]:
        """Content of a checkpoint besides the configuration."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.average.state if self.average is not None else {},
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "rollbacks": self.rollbacks,
            "unvalidated": self.unvalidated,
            "seed": self.options.seed,
            "provenance": dict(self.options.provenance),
        }

    def save(self, name: str = "last.pt") -> Path:
        """Writes `out/name` in the first process."""
        path = self.options.out / name
        if distributed.is_main():
            save_checkpoint(path, self.config, self.state())
        return path

    def train_step(self, *batches: Batch) -> dict[str, float]:
        """Forward and backward pass and update of the weights.

        Args:
            batches: Batches of this process in this step, one per forward pass.

        Returns:
            Losses, learning rate and gradient norm of the whole step, the same in every process.

        Raises:
            Diverged: The loss or the gradient is not finite.
            Interrupted: SIGTERM; the state is that before the step.
        """
        schedule = self.config.schedule
        if self.freeze.apply(self.step):
            # Processes exchange the gradients of other parameters from now on.
            self.objective = build_objective(self.model, self.config, self.options)
        rate = learning_rate(schedule, self.step, self.steps_per_epoch) * 0.5**self.rollbacks
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        try:
            with self.termination.interruptible(self._steps_interruptible):
                losses = self._backward(batches)
        except (Interrupted, RuntimeError) as error:
            if isinstance(error, Interrupted) or distributed.is_lost_peer(error):
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)  # batch norm statistics
            raise
        if not math.isfinite(losses["total"]):
            raise Diverged(f"loss is {losses['total']} at step {self.step}")
        self.scaler.unscale_(self.optimizer)
        bound = schedule.clip_norm if schedule.clip_norm is not None else math.inf
        norm: Tensor = torch.nn.utils.clip_grad_norm_(self.model.parameters(), bound)
        if not (self.scaler.is_enabled() or norm.isfinite()):
            raise Diverged(f"gradient norm is {norm.item()} at step {self.step}")
        self.scaler.step(self.optimizer)  # skips the update if fp16 gradients overflow
        self.scaler.update()
        self.step += 1
        if self.average is not None:
            self.average.update(self.model, self.step)
        return {**losses, "lr": rate, "grad_norm": norm.item()}

    def _backward(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Computes the gradients of the step's loss, scaled for fp16, equal in every process."""
        device, processes = self.options.device, self.share.processes
        (positives,) = distributed.sum_over_processes(
            [float(sum(b.num_positives for b in batches))]
        )
        self.optimizer.zero_grad(set_to_none=True)
        parts = torch.zeros(2, device=device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            context = distributed.without_synchronisation(self.objective)
            with contextlib.nullcontext() if last else context:
                losses = self.objective(
                    batch.images.to(device, non_blocking=True),
                    batch.valid_hw.to(device, non_blocking=True),
                    batch.targets,
                    positives,
                )
                # DistributedDataParallel averages gradients over the processes; the loss is a sum.
                self.scaler.scale(losses["total"] * processes).backward()
            parts += torch.stack([losses["category"], losses["mask"]]).detach()
        category, mask = distributed.sum_over_processes(parts.tolist())
        return {
            "category": category,
            "mask": mask,
            "total": category + mask,
            "num_positives": positives,
        }

    def averaged_model(self) -> Solo:
        """A copy of the model in evaluation mode, with the averaged weights if there are any."""
        model = Solo(self.config.model, self.config.num_classes).to(self.options.device)
        model.load_state_dict(self.average.state if self.average else self.model.state_dict())
        distributed.copy_from_main(model.state_dict().values())  # batch norm statistics may differ
        return model.eval()

    def fit(self) -> Path:
        """Trains until the schedule or the time limit ends; returns the last checkpoint.

        Raises:
            Diverged: The loss was not finite after several rollbacks, or at the first step.
            Terminated: A process received SIGTERM; the checkpoint is written.
        """
        self.model.train()
        if self.step == 0:
            self.save(ROLLBACK_FILE)
        note = f"resumed with {', '.join(map(str, self.changes))}" if self.changes else ""
        with self.termination:
            while True:
                try:
                    with self.termination.shared():
                        self._fit(note)
                except Diverged as error:
                    note = self._roll_back(error)
                except Interrupted:
                    self._stop()
                else:
                    return self.save()

    def _stop(self) -> NoReturn:
        """Saves and ends; only the first process knows the step that is saved.

        Another may have been interrupted a step before or after it.
        """
        self.save()
        where = f" at step {self.step}" if distributed.is_main() else ""
        raise Terminated(f"stopped by SIGTERM{where}")

    def _roll_back(self, error: Diverged) -> str:
        """Returns to the checkpoint for rollbacks with half the learning rate; says so.

        Raises:
            Diverged: It is of the same step, or this was done too often; last.pt is then that
                checkpoint.
        """
        content, count = self.rollback.load(self.step, error), self.rollbacks
        self._restore(content, self.rollback.path)
        self.rollbacks = min(count + 1, MOST)
        if count == MOST:
            self.save()
            raise give_up(error, self.step)
        return describe_rollback(error, self.step, self.rollbacks)

    def _fit(self, note: str) -> None:
        """Trains from the current step; `note` says why it starts here, if it is not empty."""
        started, before = time.monotonic(), self.seconds
        self._started = started, self.step
        steps = self.batches()
        bar = tqdm(
            initial=self.step,
            total=self.total_steps,
            desc=self.options.label or None,
            unit="step",
            disable=not distributed.is_main(),
        )
        log = RunLog(self.options.out, self.step, enabled=distributed.is_main())
        with contextlib.closing(steps), log, bar:
            if note:
                log.note(self.step, note)
                self.save()  # so that it is noted once
            if self.unvalidated:
                self._validate(log)
            while batches := self._next(steps):
                numbers = self.train_step(*batches)
                self.seconds = before + time.monotonic() - started
                bar.update()
                self.rollback.keep(self.step)
                if self.step % self.options.log_every == 0:
                    log.write(self.step, {**numbers, "seconds": self.seconds})
                    bar.set_postfix(loss=f"{numbers['total']:.3f}", mask=f"{numbers['mask']:.3f}")
                if self._finish_step(log):
                    break

    def _next(self, steps: Iterator[list[Batch]]) -> list[Batch]:
        """The batches of the next step; none after the last.

        The exchange with data loading processes is not interruptible: they would report an error.
        """
        enabled = self.options.workers == 0 and self._steps_interruptible
        with self.termination.interruptible(enabled):
            return next(steps, [])

    def _finish_step(self, log: RunLog) -> bool:
        """Validates and saves if it is time; whether to stop because of the time limit.

        Raises:
            Interrupted: A process received SIGTERM.
        """
        options = self.options
        late = options.max_seconds is not None and self.seconds > options.max_seconds
        self.unvalidated = self._validation_due()
        stop, terminated = distributed.any_process(late, self.termination.received)
        self.unvalidated |= stop and not terminated
        if terminated:
            raise Interrupted
        if self.unvalidated:
            self._validate(log)
        if not stop and self.step % options.checkpoint_every == 0:
            self.save()
        return stop

    def batches(self) -> Generator[list[Batch]]:
        """Yields the batches of this process, one list per step."""
        loader = build_loader(
            self.data,
            self.config,
            seed=self.options.seed,
            start_step=self.step,
            stop_step=self.total_steps,
            workers=self.options.workers,
            pinned=self.options.device.startswith("cuda"),
            share=self.share,
        )
        batches = iter(loader)
        while step := list(islice(batches, self.share.accumulate)):
            yield step

    def _seconds_left(self) -> float | None:
        """Estimate from the steps and validations since this start; None before the first step."""
        clock, first = self._started
        if self.step == first:
            return None
        per_step = (time.monotonic() - clock) / (self.step - first)
        left = (self.total_steps - self.step) * per_step
        limit = self.options.max_seconds
        return left if limit is None else max(0.0, min(left, limit - self.seconds))

    def _validation_due(self) -> bool:
        if self.step == self.total_steps:
            return True
        every = self.options.validate_every * self.steps_per_epoch
        return every > 0 and self.step % every == 0

    def _validate(self, log: RunLog) -> None:
        if self.validate is None:
            self.unvalidated = False
            return
        pictures: list[Picture] = []
        model = self.averaged_model()
        with self.termination.interruptible():
            numbers = self.validate(model, self.config)
            if self.pictures is not None and distributed.is_main():
                pictures = self.pictures(model, self.config)
        self.unvalidated = False
        log.write(self.step, {f"val/{k}": v for k, v in numbers.items()})
        if distributed.is_main():
            found = describe_metrics(numbers)
            state = f"step {self.step} of {self.total_steps}, {describe_left(self._seconds_left())}"
            tqdm.write(f"{state}: {found}")
            write_report(self.options.out, self.config.name, f"{state}: {found}", pictures)
        if numbers["AP"] > self.best:
            self.best = numbers["AP"]
            self.save(BEST_FILE)
