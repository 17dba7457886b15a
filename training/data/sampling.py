"""Order of the images: depends only on the seed and the epoch.

The order is that of the global batches, and a run can start at any step. The number of processes
that share a batch, and the number of forward passes of each, change neither the batches nor the
canvases, so they do not change the training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from pipeline.model_config import TileResize
from training.configs.schema import Config

Rng = np.random.Generator
Item = tuple[int, int]
"""(epoch, index), which determines a sample together with the seed."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of every global batch that one process gets.

    Attributes:
        rank: Rank of the process.
        processes: Number of processes.
        accumulate: Forward passes per step of each process.
    """

    rank: int = 0
    processes: int = 1
    accumulate: int = 1


def plan_share(config: Config, *, rank: int, processes: int, accumulate: int | None) -> Share:
    """The part of every batch for a process.

    Args:
        config: Batch size and canvas.
        rank: Rank of this process.
        processes: Number of processes.
        accumulate: Forward passes per step of each process; None: one for tiles, else one for
            every group of images that share a canvas.

    Raises:
        ValueError: The batch cannot be split in this way.
    """
    batch = config.schedule.batch_size
    images, rest = divmod(batch, processes)
    if rest:
        raise ValueError(f"batch_size {batch} cannot be split evenly over {processes} processes")
    if accumulate is None:
        tiles = isinstance(config.input.resize, TileResize)
        accumulate = 1 if tiles else images // math.gcd(images, config.schedule.canvas_group)
    if accumulate < 1 or images % accumulate:
        raise ValueError(
            f"accumulate is {accumulate}, expected a divisor of the {images} images of a process"
        )
    return Share(rank=rank, processes=processes, accumulate=accumulate)


@dataclass(frozen=True)
class MicroBatch:
    """The part of a global batch for one forward pass.

    Attributes:
        items: Its samples.
        canvas_items: The samples that determine its canvas, possibly of other processes too.
    """

    items: tuple[Item, ...]
    canvas_items: tuple[Item, ...]


def group_by_aspect(
    order: NDArray[np.int64], portrait: NDArray[np.bool_], group: int, start: int, rng: Rng
) -> NDArray[np.int64]:
    """Reorders an epoch so that each group is all landscape or all portrait.

    Args:
        order: A permutation of the images, [N].
        portrait: Whether an image is taller than wide, [N].
        group: Images per group.
        start: Number of first images that complete the last group of the previous epoch.
        rng: Shuffles the groups.

    Returns:
        [N], the same images. At most two groups are mixed: the one that starts in the previous
        epoch, and one of the remaining images of both kinds.
    """
    head, rest = order[:start], order[start:]
    kinds = [rest[~portrait[rest]], rest[portrait[rest]]]
    whole = [len(kind) // group * group for kind in kinds]
    left = np.concatenate([kind[n:] for kind, n in zip(kinds, whole, strict=True)])
    mixed = len(left) // group * group
    parts = [kind[:n] for kind, n in zip(kinds, whole, strict=True)] + [left[:mixed]]
    groups = np.concatenate(parts).reshape(-1, group)
    return np.concatenate([head, rng.permutation(groups).ravel(), left[mixed:]])


class EpochBatches(Sampler[list[Item]]):
    """Full batches in shuffled order over consecutive epochs, starting at any step.

    If an epoch does not divide into batches, its last batch is filled from the next epoch, so every
    batch is full and `steps_per_epoch` is rounded down. A set smaller than a batch is repeated.

    Args:
        size: Number of images.
        batch_size: Images per batch.
        seed: Seed of the shuffling.
        start_step: First step.
        stop_step: One past the last step.
        portrait: Whether an image is taller than wide, [size]; None: images are not grouped.
        group: Number of consecutive images that are all portrait or all landscape, a divisor of
            `batch_size`.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start_step: int,
        stop_step: int,
        *,
        portrait: NDArray[np.bool_] | None = None,
        group: int = 1,
    ) -> None:
        if size == 0:
            raise ValueError("the training split has no images")
        if batch_size % group:
            raise ValueError(f"group is {group}, expected a divisor of the batch of {batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start_step, self.stop_step = start_step, stop_step
        self.portrait, self.group = portrait, group

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.size)
        if self.portrait is None or self.group == 1:
            return order
        start = -epoch * self.size % self.group
        return group_by_aspect(order, self.portrait, self.group, start, rng)

    def __iter__(self) -> Iterator[list[Item]]:
        """Yields batches of (epoch, index)."""
        orders: dict[int, NDArray[np.int64]] = {}
        for step in range(self.start_step, self.stop_step):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                epoch, place = divmod(position, self.size)
                if epoch not in orders:
                    orders = {e: o for e, o in orders.items() if e >= epoch - 1}
                    orders[epoch] = self._order(epoch)
                batch.append((epoch, int(orders[epoch][place])))
            yield batch


class SharedBatches(Sampler[MicroBatch]):
    """One process's part of every global batch: `accumulate` micro-batches a step."""

    def __init__(self, batches: EpochBatches, share: Share) -> None:
        self.batches, self.share = batches, share

    def __len__(self) -> int:
        return len(self.batches) * self.share.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields the micro-batches in the order of the steps."""
        share, group = self.share, self.batches.group
        images = self.batches.batch_size // share.processes
        size = images // share.accumulate
        for batch in self.batches:
            for part in range(share.accumulate):
                start = share.rank * images + part * size
                first, last = start // group * group, -(-(start + size) // group) * group
                yield MicroBatch(tuple(batch[start : start + size]), tuple(batch[first:last]))
