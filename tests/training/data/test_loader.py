from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny import (
    CANVAS,
    TINY,
    TINY_SGD,
    build_tiny_data,
    disc,
    write_image,
    write_split,
)
from training.configs.schema import Config
from training.data.augment import build_sample
from training.data.coco import CocoDataset
from training.data.loader import Batch, TrainingSamples, build_loader, collate
from training.data.sampling import plan_share


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


def test_batches_are_pinned_with_all_their_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies stand in for page-locked memory, which needs a GPU."""
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.append(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    options = {"seed": 3, "start_step": 0, "stop_step": 1, "workers": 0}
    (batch,) = build_loader(data, TINY, **options)  # type: ignore[arg-type]
    copy = batch.pin_memory()
    assert same(batch, copy) and batch.num_positives == copy.num_positives > 0
    arrays = [
        getattr(level, name)
        for image in copy.targets
        for level in image
        for name in ("labels", "cells", "mask_index", "masks")
    ]
    assert {copy.images.data_ptr(), copy.valid_hw.data_ptr()} <= set(pinned)
    assert {array.ctypes.data for array in arrays if array.size} <= set(pinned)
    assert build_loader(data, TINY, pinned=True, **options).pin_memory  # type: ignore[arg-type]
    assert not build_loader(data, TINY, **options).pin_memory  # type: ignore[arg-type]


def test_a_sample_changes_from_epoch_to_epoch(tmp_path: Path) -> None:
    samples = TrainingSamples(CocoDataset(build_tiny_data(tmp_path), "train"), TINY, seed=0)
    assert len(samples) == 3
    np.testing.assert_array_equal(samples[(0, 1)].image, samples[(0, 1)].image)
    first, second = samples[(0, 1)].image, samples[(1, 1)].image
    assert first.shape != second.shape or (first != second).any()


def test_tiles_are_padded_to_the_serving_canvas() -> None:
    image = np.full((50, 60, 3), 9, np.uint8)
    batch = collate([build_sample(image, [(disc(50, 60, 20, 20, 8), 1)])] * 2, TINY)
    assert batch.images.shape == (2, CANVAS, CANVAS, 3)
    assert batch.valid_hw.tolist() == [[50, 60]] * 2 and batch.valid_hw.dtype == torch.int64
    assert (batch.images[:, :50, :60] == 9).all()
    assert batch.images[:, 50:].max() == 0 and batch.images[:, :, 60:].max() == 0
    assert [t.labels.shape for t in batch.targets[0]] == [(8, 8), (4, 4)]


def test_other_images_are_padded_to_the_largest_of_the_batch() -> None:
    samples = [
        build_sample(np.zeros((40, 70, 3), np.uint8), []),
        build_sample(np.zeros((65, 30, 3), np.uint8), [(disc(65, 30, 30, 15, 8), 0)]),
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


def keep_ratio(images: int, per_canvas: int) -> Config:
    schedule = replace(TINY_SGD.schedule, batch_size=images, images_per_canvas=per_canvas)
    return replace(TINY_SGD, schedule=schedule)


@pytest.mark.parametrize("config", [keep_ratio(4, 2), keep_ratio(4, 4), keep_ratio(4, 1)])
@pytest.mark.parametrize(
    ("processes", "accumulate"), [(1, None), (1, 4), (2, None), (2, 2), (4, 1)]
)
def test_a_sample_and_its_canvas_do_not_depend_on_how_the_batch_is_split(
    config: Config, processes: int, accumulate: int | None, tmp_path: Path
) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    whole = config.schedule.canvas_group  # the split in which every canvas has its own batch

    def images(processes: int, accumulate: int | None) -> list[tuple[torch.Tensor, int]]:
        """Canvas and positive cells of every image of three steps, in the order of the batch."""
        loaders = []
        for rank in range(processes):
            share = plan_share(config, rank=rank, processes=processes, accumulate=accumulate)
            loader = build_loader(
                data, config, seed=0, start_step=0, stop_step=3, workers=0, share=share
            )
            loaders.append(list(loader))
        found = []
        for step in range(3):
            for batches in loaders:
                for batch in batches[step * len(batches) // 3 : (step + 1) * len(batches) // 3]:
                    for image, levels in zip(batch.images, batch.targets, strict=True):
                        found.append((image, sum(len(level.cells) for level in levels)))
        return found

    one, other = images(1, 4 // whole), images(processes, accumulate)
    assert len(one) == len(other) == 12
    for (a, positives), (b, others) in zip(one, other, strict=True):
        assert torch.equal(a, b) and positives == others


def test_a_batch_counts_its_positive_cells(tmp_path: Path) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    config = keep_ratio(3, 3)
    (batch,) = build_loader(data, config, seed=0, start_step=0, stop_step=1, workers=0)
    labelled = [level.labels < config.num_classes for image in batch.targets for level in image]
    assert batch.num_positives == sum(int(cells.sum()) for cells in labelled) > 0


def build_mixed_data(root: Path) -> CocoDataset:
    """Eight landscape and eight portrait images without objects, in turns."""
    sizes = [(40, 80), (80, 40)] * 8
    images = [(f"{i}.png", height, width) for i, (height, width) in enumerate(sizes)]
    for name, height, width in images:
        write_image(root / "images" / name, np.zeros((height, width, 3), np.uint8))
    write_split(root, "train", images, [])
    return CocoDataset(root, "train")


@pytest.mark.parametrize(
    ("config", "grouped"), [(keep_ratio(4, 2), True), (keep_ratio(4, 1), False), (TINY, False)]
)
def test_images_of_one_canvas_have_one_orientation(
    config: Config, grouped: bool, tmp_path: Path
) -> None:
    """Only with the keep-ratio rule: tiles have one canvas, so their order stays free."""
    data = build_mixed_data(tmp_path)
    config = replace(config, schedule=replace(config.schedule, batch_size=4))
    loader = build_loader(data, config, seed=0, start_step=0, stop_step=12, workers=0)
    batches: Any = loader.sampler
    items = [item for batch in batches for item in batch.items]
    portrait = [data.records[index].height > data.records[index].width for _, index in items]
    assert len(portrait) == 48
    pairs = list(zip(portrait[::2], portrait[1::2], strict=True))
    assert all(a == b for a, b in pairs) == grouped
