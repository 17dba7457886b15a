"""Batches in an order that depends on the seed and the epoch alone, so a run can resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from service.pipeline.model_config import TileResize
from training.configs.schema import Config
from training.data.augment import Sample, random_keep_ratio, random_tile
from training.data.coco import CocoDataset
from training.targets import LevelTargets, assign_targets


@dataclass(frozen=True)
class Batch:
    """One training step's input.

    Attributes:
        images: [B, H, W, 3] uint8, zero padded at the bottom and the right.
        valid_hw: [B, 2] int64, px of the canvas that show the image.
        targets: [B][level].
    """

    images: Tensor
    valid_hw: Tensor
    targets: list[list[LevelTargets]]


class TrainingSamples(Dataset[Sample]):
    """Augmented samples; item (epoch, index) is the same whenever it is asked for."""

    def __init__(self, data: CocoDataset, config: Config, seed: int) -> None:
        self.data = data
        self.config = config
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        """The sample of (epoch, index)."""
        epoch, index = item
        rng = np.random.default_rng((self.seed, epoch, index))
        image = self.data.image(index)
        annotations = self.data.records[index].annotations
        resize = self.config.input.resize
        augment = self.config.augment
        if isinstance(resize, TileResize):
            return random_tile(image, annotations, resize, augment, rng)
        return random_keep_ratio(image, annotations, resize, augment, rng)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled full batches of one epoch after another, from any step on.

    An epoch that does not divide is completed by the next one's order, so each batch is full
    and `steps_per_epoch` is the rounded-down quotient; a set smaller than a batch repeats.

    Args:
        size: Number of images.
        batch_size: Images a batch.
        seed: Seed of the shuffling.
        start_step: First step to deliver.
        stop_step: One past the last step.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, start_step: int, stop_step: int
    ) -> None:
        if size == 0:
            raise ValueError("the training split has no images")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start_step, self.stop_step = start_step, stop_step

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yields batches of (epoch, index)."""
        orders: dict[int, NDArray[np.int64]] = {}
        for step in range(self.start_step, self.stop_step):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                epoch, place = divmod(position, self.size)
                if epoch not in orders:
                    rng = np.random.default_rng((self.seed, epoch))
                    orders = {e: o for e, o in orders.items() if e >= epoch - 1}
                    orders[epoch] = rng.permutation(self.size)
                batch.append((epoch, int(orders[epoch][place])))
            yield batch


def collate(samples: Sequence[Sample], config: Config) -> Batch:
    """Pads the samples to one canvas and assigns targets, which are relative to it.

    The canvas is the serving canvas for tiles, else the largest sample's, divisible by 32.
    """
    resize = config.input.resize
    if isinstance(resize, TileResize):
        height, width = (round(side * resize.scale) for side in resize.tile_hw)
    else:
        divisor = config.model.stride_divisor
        sides = np.array([s.image.shape[:2] for s in samples]).max(axis=0)
        height, width = (int(-(-side // divisor) * divisor) for side in sides)
    images = np.zeros((len(samples), height, width, 3), np.uint8)
    for canvas, sample in zip(images, samples, strict=True):
        canvas[: sample.image.shape[0], : sample.image.shape[1]] = sample.image
    targets = [
        assign_targets(
            s.objects, (height, width), config.model.head, config.targets, config.num_classes
        )
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
) -> DataLoader[Batch]:
    """Batches of the steps start_step..stop_step - 1."""
    batches = EpochBatches(len(data), config.schedule.batch_size, seed, start_step, stop_step)
    # DataLoader's type parameter is that of the samples; collate_fn makes batches of them.
    samples: Dataset[Any] = TrainingSamples(data, config, seed)
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=partial(collate, config=config),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
