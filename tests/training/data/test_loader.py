from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import CANVAS, TINY, TINY_SGD, build_tiny_data, disc
from training.data.augment import build_sample
from training.data.coco import CocoDataset
from training.data.loader import Batch, EpochBatches, TrainingSamples, build_loader, collate


def items(size: int, batch: int, seed: int, start: int, stop: int) -> list[list[tuple[int, int]]]:
    return list(EpochBatches(size, batch, seed, start, stop))


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (3, 8), (4, 4), (1, 2)])
def test_a_run_can_start_at_any_step(size: int, batch: int) -> None:
    whole = items(size, batch, 7, 0, 12)
    for start in (1, 5, 11, 12):
        assert items(size, batch, 7, start, 12) == whole[start:]
    assert len(EpochBatches(size, batch, 7, 5, 12)) == 7
    assert len(EpochBatches(size, batch, 7, 12, 5)) == 0


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (3, 8), (4, 4)])
def test_every_epoch_shows_every_image_once(size: int, batch: int) -> None:
    steps = -(-size * 4 // batch)
    flat = [item for one in items(size, batch, 0, 0, steps) for item in one]
    for epoch in range(3):
        assert sorted(i for e, i in flat if e == epoch) == list(range(size))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = items(50, 50, 0, 0, 2)
    assert first == items(50, 50, 0, 0, 2)
    assert [i for _, i in first[0]] != [i for _, i in first[1]]
    assert first != items(50, 50, 1, 0, 2)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        EpochBatches(0, 2, 0, 0, 1)


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.valid_hw, b.valid_hw)
        and all(
            np.array_equal(x.labels, y.labels) and np.array_equal(x.masks, y.masks)
            for i, j in zip(a.targets, b.targets, strict=True)
            for x, y in zip(i, j, strict=True)
        )
    )


def test_batches_do_not_depend_on_workers_or_where_the_run_started(tmp_path: Path) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    batches = list(build_loader(data, TINY, seed=3, start_step=0, stop_step=4, workers=0))
    resumed = list(build_loader(data, TINY, seed=3, start_step=2, stop_step=4, workers=1))
    assert len(batches) == 4 and len(resumed) == 2
    assert all(same(a, b) for a, b in zip(batches[2:], resumed, strict=True))
    other = next(iter(build_loader(data, TINY, seed=4, start_step=0, stop_step=1, workers=0)))
    assert not same(batches[0], other)


def test_a_sample_changes_from_epoch_to_epoch(tmp_path: Path) -> None:
    samples = TrainingSamples(CocoDataset(build_tiny_data(tmp_path), "train"), TINY, seed=0)
    assert len(samples) == 3
    np.testing.assert_array_equal(samples[(0, 1)].image, samples[(0, 1)].image)
    first, second = samples[(0, 1)].image, samples[(1, 1)].image
    assert first.shape != second.shape or (first != second).any()


def test_tiles_are_padded_to_the_serving_canvas() -> None:
    image = np.full((50, 60, 3), 9, np.uint8)
    batch = collate([build_sample(image, [disc(50, 60, 20, 20, 8)], [1])] * 2, TINY)
    assert batch.images.shape == (2, CANVAS, CANVAS, 3)
    assert batch.valid_hw.tolist() == [[50, 60]] * 2 and batch.valid_hw.dtype == torch.int64
    assert (batch.images[:, :50, :60] == 9).all()
    assert batch.images[:, 50:].max() == 0 and batch.images[:, :, 60:].max() == 0
    assert [t.labels.shape for t in batch.targets[0]] == [(8, 8), (4, 4)]


def test_other_images_are_padded_to_the_largest_of_the_batch() -> None:
    samples = [
        build_sample(np.zeros((40, 70, 3), np.uint8), [], []),
        build_sample(np.zeros((65, 30, 3), np.uint8), [disc(65, 30, 30, 15, 8)], [0]),
    ]
    batch = collate(samples, TINY_SGD)
    assert batch.images.shape == (2, 96, 96, 3)
    assert batch.targets[1][0].masks.shape[1:] == (24, 24)
    alone = collate(samples[1:], TINY_SGD)
    assert alone.images.shape == (1, 96, 32, 3)


def test_an_epoch_of_samples_by_the_keep_ratio_rule(tmp_path: Path) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    config = replace(TINY_SGD, schedule=replace(TINY_SGD.schedule, batch_size=3))
    (batch,) = build_loader(data, config, seed=0, start_step=0, stop_step=1, workers=0)
    assert len(batch.targets) == 3
    assert batch.images.shape[1] % 32 == 0 and batch.images.shape[2] % 32 == 0
