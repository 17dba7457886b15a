"""Padded batches with their targets, one per forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.model_config import TileResize
from training.configs.schema import Config
from training.data.augment import Sample, check_sizes, random_keep_ratio, random_size, random_tile
from training.data.coco import CocoDataset
from training.data.sampling import EpochBatches, Item, MicroBatch, Share, SharedBatches
from training.targets import LevelTargets, assign_targets
from training.termination import init_worker


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass.

    Attributes:
        images: [B, H, W, 3] uint8, zero padded at the bottom and the right.
        valid_hw: [B, 2] int64, height and width of the image on the canvas, px.
        targets: [B][level].
    """

    images: Tensor
    valid_hw: Tensor
    targets: list[list[LevelTargets]]

    @property
    def num_positives(self) -> int:
        """Positive cells of all images and levels."""
        return sum(len(level.cells) for image in self.targets for level in image)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which copies to a GPU are asynchronous.

        The DataLoader calls it, in a thread of its own.
        """
        targets = [[_pin(level) for level in image] for image in self.targets]
        return Batch(self.images.pin_memory(), self.valid_hw.pin_memory(), targets)


def _pin(target: LevelTargets) -> LevelTargets:
    names = ("labels", "cells", "mask_index", "masks")
    arrays = {name: torch.from_numpy(np.asarray(getattr(target, name))) for name in names}
    return replace(target, **{name: array.pin_memory().numpy() for name, array in arrays.items()})


class TrainingSamples(Dataset[Sample]):
    """Augmented samples; an item depends only on (epoch, index) and the seed."""

    def __init__(self, data: CocoDataset, config: Config, seed: int) -> None:
        if not isinstance(config.input.resize, TileResize):
            check_sizes(config.input.resize, config.augment)
        self.data = data
        self.config = config
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def _rng(self, item: Item) -> np.random.Generator:
        return np.random.default_rng((self.seed, *item))

    def canvas_hw(self, items: Sequence[Item]) -> tuple[int, int]:
        """Height and width of the canvas of these samples, px; no image is read.

        For tiles it is the canvas of serving, else the smallest one that is divisible by 32 and
        holds every sample.
        """
        resize = self.config.input.resize
        if isinstance(resize, TileResize):
            return resize.canvas_hw
        sizes = []
        for item in items:
            record = self.data.records[item[1]]
            image_hw = record.height, record.width
            sizes.append(random_size(image_hw, resize, self.config.augment, self._rng(item)))
        return enclosing_canvas(sizes, self.config.model.stride_divisor)

    def __getitem__(self, item: Item) -> Sample:
        """The sample of (epoch, index)."""
        rng, index = self._rng(item), item[1]
        image = self.data.image(index)
        record = self.data.records[index]
        annotations = record.annotations
        resize = self.config.input.resize
        augment = self.config.augment
        if isinstance(resize, TileResize):
            sample = random_tile(image, annotations, resize, augment, rng)
        else:
            sample = random_keep_ratio(image, annotations, resize, augment, rng)
        exhaustive = record.exhaustive(self.config.num_classes)
        return replace(sample, objects=replace(sample.objects, exhaustive=exhaustive))


class MicroBatches(Dataset[Batch]):
    """Batches of augmented samples, padded to their canvas."""

    def __init__(self, samples: TrainingSamples) -> None:
        self.samples = samples

    def __getitem__(self, micro: MicroBatch) -> Batch:
        """Loads the samples of a micro-batch."""
        canvas_hw = self.samples.canvas_hw(micro.canvas_items)
        return collate([self.samples[i] for i in micro.items], self.samples.config, canvas_hw)


def enclosing_canvas(sizes: Sequence[tuple[int, int]], divisor: int) -> tuple[int, int]:
    """The smallest (height, width) divisible by `divisor` that holds every size."""
    height, width = (int(-(-side // divisor) * divisor) for side in np.max(sizes, axis=0))
    return height, width


def collate(
    samples: Sequence[Sample], config: Config, canvas_hw: tuple[int, int] | None = None
) -> Batch:
    """Pads the samples to one canvas and assigns their targets.

    Args:
        samples: B samples.
        config: Canvas rule, head and targets.
        canvas_hw: The canvas, px; None: the canvas of these samples.
    """
    resize = config.input.resize
    if canvas_hw is None and isinstance(resize, TileResize):
        canvas_hw = resize.canvas_hw
    elif canvas_hw is None:
        sizes = [(s.image.shape[0], s.image.shape[1]) for s in samples]
        canvas_hw = enclosing_canvas(sizes, config.model.stride_divisor)
    images = np.zeros((len(samples), *canvas_hw, 3), np.uint8)
    for canvas, sample in zip(images, samples, strict=True):
        canvas[: sample.image.shape[0], : sample.image.shape[1]] = sample.image
    targets = [
        assign_targets(s.objects, canvas_hw, config.model.head, config.targets, config.num_classes)
        for s in samples
    ]
    valid_hw = torch.tensor([s.image.shape[:2] for s in samples], dtype=torch.int64)
    return Batch(torch.from_numpy(images), valid_hw, targets)


def build_loader(
    data: CocoDataset,
    config: Config,
    *,
    seed: int,
    start_step: int,
    stop_step: int,
    workers: int = 1,
    share: Share | None = None,
    pinned: bool = False,
) -> DataLoader[Batch]:
    """Loads the batches of steps start_step..stop_step - 1.

    Args:
        data: The images.
        config: Canvas, augmentation, targets and batch size.
        seed: Of the order and the augmentation.
        start_step: The first step.
        stop_step: The step after the last.
        workers: Processes that load; 0 loads in the calling one.
        share: Of this process; None: all of each step as one batch.
        pinned: Whether batches are in page-locked memory, for a GPU.
    """
    schedule, portrait, group = config.schedule, None, 1
    if not isinstance(config.input.resize, TileResize):
        portrait = np.array([r.height > r.width for r in data.records], np.bool_)
        group = schedule.canvas_group
    batches = EpochBatches(
        len(data),
        schedule.batch_size,
        seed,
        start_step,
        stop_step,
        portrait=portrait,
        group=group,
    )
    # DataLoader has one type parameter for the batches and for the keys of its sampler.
    sampler: Any = SharedBatches(batches, share or Share())
    return DataLoader(
        MicroBatches(TrainingSamples(data, config, seed)),
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=pinned,
        prefetch_factor=4 if workers else None,
        worker_init_fn=init_worker,
    )
