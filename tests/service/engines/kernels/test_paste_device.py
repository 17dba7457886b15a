"""The kernels' run lengths against the NumPy pipeline's: the same bytes, boxes and areas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.postprocess import mask_stride
from pipeline.runs import build_instance
from pipeline.types import Detection, Float32, Tile, Window
from service.engines.kernels import paste as kernel_paste
from service.engines.kernels.launcher import Launcher
from service.engines.kernels.paste import MaskPlane, PastedMask, paste_masks
from service.engines.kernels.select import MaskType
from service.engines.kernels.workspace import WorkspacePool
from tests.support.dense_paste import paste_mask
from tests.support.kernel_cases import (
    TIE,
    draw_image_hw,
    draw_masks,
    draw_special_masks,
    draw_tile,
    exact_probs,
    narrow,
)
from tests.support.kernel_host import HostLauncher, Uploads


def jobs_of(masks: Float32, threshold: float) -> NDArray[np.int32]:
    """[N, 5] of the masks that are not empty."""
    rows = []
    for index, mask in enumerate(masks):
        above = mask > threshold
        y, x = np.flatnonzero(above.any(axis=1)), np.flatnonzero(above.any(axis=0))
        if len(y):
            rows.append((index, y[0], y[-1], x[0], x[-1]))
    return np.array(rows, np.int32).reshape(-1, 5)


def run(
    launcher: Launcher,
    uploads: Uploads,
    masks: Float32,
    tile: Tile,
    image_hw: tuple[int, int],
    *,
    threshold: float = 0.5,
    mask_type: MaskType = "float32",
) -> tuple[list[PastedMask | None], list[Detection | None]]:
    """What the kernels and what the pipeline make of the masks that are not empty."""
    stored, values = narrow(masks, mask_type)
    hw = (masks.shape[1], masks.shape[2])
    stride = mask_stride(tile, hw)
    plane = MaskPlane(uploads.put(stored), mask_type, hw, stride, threshold)
    jobs = jobs_of(values, threshold)
    pool = WorkspacePool(launcher.device)
    with pool.borrow() as workspace:
        found = paste_masks(launcher, workspace, plane, tile, image_hw, jobs)
    pool.close()
    expected = []
    for index in jobs[:, 0]:
        box = paste_mask(values[index], tile, stride, threshold)
        expected.append(None if box is None else build_instance(box, image_hw, 0, 1.0))
    return found, expected


def differences(
    found: list[PastedMask | None], expected: list[Detection | None], masks: Float32, tile: Tile
) -> int:
    """How many masks differ; each only in pixels within a tie of the threshold, or this fails.

    `masks` are those of the jobs.
    """
    count = 0
    for ours, theirs, probs in zip(found, expected, masks, strict=True):
        if ours is None or theirs is None:
            assert ours is None and theirs is None
            continue
        if (ours.rle, ours.bbox_xywh, ours.area) == (theirs.rle, theirs.bbox_xywh, theirs.area):
            continue
        count += 1
        window = tile.window
        region = np.s_[window.y : window.y + window.height, window.x : window.x + window.width]
        unequal = coco_mask.decode(ours.rle)[region] != coco_mask.decode(theirs.rle)[region]
        assert (np.abs(exact_probs(probs, tile)[unequal] - 0.5) < TIE).all()
    return count


def assert_equal(
    found: list[PastedMask | None], expected: list[Detection | None], masks: Float32, tile: Tile
) -> None:
    """At most one mask of a thousand may differ, and in ties alone."""
    assert differences(found, expected, masks, tile) <= len(found) / 1000


@pytest.mark.parametrize("seed", range(24))
def test_equals_numpy(launcher: Launcher, uploads: Uploads, seed: int) -> None:
    rng = np.random.default_rng(seed)
    hw = [(25, 31), (40, 56), (33, 20), (64, 64)][seed % 4]
    stride = (1, 2, 4, 8)[seed // 4 % 4]
    tile = draw_tile(rng, hw, stride)
    masks = draw_masks(rng, 12, hw)
    found, expected = run(launcher, uploads, masks, tile, draw_image_hw(rng, tile))
    assert any(found)
    assert_equal(found, expected, masks[jobs_of(masks, 0.5)[:, 0]], tile)


@pytest.mark.parametrize("seed", range(8))
def test_special_masks(launcher: Launcher, uploads: Uploads, seed: int) -> None:
    """Also windows as large as the image, where runs go on over the columns' borders."""
    rng = np.random.default_rng(seed)
    hw = (32, 45) if seed % 2 else (30, 20)
    tile = draw_tile(rng, hw, 4)
    image_hw = draw_image_hw(rng, tile)
    if seed < 4:
        window = Window(0, 0, tile.window.height, tile.window.width)
        tile = replace(tile, window=window)
        image_hw = (window.height, window.width)
    masks = draw_special_masks(hw)
    found, expected = run(launcher, uploads, masks, tile, image_hw)
    assert_equal(found, expected, masks[jobs_of(masks, 0.5)[:, 0]], tile)


def test_a_full_mask_is_one_run(launcher: Launcher, uploads: Uploads) -> None:
    tile = Tile(np.zeros((64, 96, 3), np.uint8), (64, 96), Window(0, 0, 100, 150))
    (found,), _ = run(launcher, uploads, np.ones((1, 16, 24), np.float32), tile, (100, 150))
    assert found is not None
    assert found.bbox_xywh == (0, 0, 150, 100)
    assert found.area == 15000
    rle = coco_mask.frPyObjects({"size": [100, 150], "counts": [0, 15000]}, 100, 150)
    assert found.rle["counts"] == rle["counts"]


def test_a_mask_in_the_padding_alone_is_none(launcher: Launcher, uploads: Uploads) -> None:
    tile = Tile(np.zeros((64, 64, 3), np.uint8), (32, 64), Window(0, 0, 50, 100))
    masks = np.zeros((2, 16, 16), np.float32)
    masks[0, 12:] = 1
    masks[1, :4] = 1
    found, expected = run(launcher, uploads, masks, tile, (50, 100))
    assert found[0] is None
    assert found[1] is not None
    assert_equal(found, expected, masks, tile)


@pytest.mark.parametrize("mask_type", ["float16", "bfloat16"])
def test_sixteen_bit_masks_are_those_numbers(
    launcher: Launcher, uploads: Uploads, mask_type: MaskType
) -> None:
    rng = np.random.default_rng(3)
    masks = draw_masks(rng, 20, (30, 42))
    tile = draw_tile(rng, (30, 42), 4)
    found, expected = run(
        launcher, uploads, masks, tile, draw_image_hw(rng, tile), mask_type=mask_type
    )
    values = narrow(masks, mask_type)[1]
    assert_equal(found, expected, values[jobs_of(values, 0.5)[:, 0]], tile)


@pytest.mark.parametrize("threshold", [0.05, 0.95])
def test_other_thresholds(launcher: Launcher, uploads: Uploads, threshold: float) -> None:
    rng = np.random.default_rng(4)
    masks = draw_masks(rng, 20, (30, 42))
    tile = draw_tile(rng, (30, 42), 2)
    found, expected = run(
        launcher, uploads, masks, tile, draw_image_hw(rng, tile), threshold=threshold
    )
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None]
    assert pairs
    assert all(b is not None and a.rle == b.rle for a, b in pairs)


@pytest.mark.parametrize("hw", [(1, 1), (1, 7), (6, 1), (2, 2), (2, 40)])
def test_masks_of_a_row_or_a_pixel(
    launcher: Launcher, uploads: Uploads, hw: tuple[int, int]
) -> None:
    rng = np.random.default_rng(6)
    tile = draw_tile(rng, hw, 8)
    masks = rng.uniform(0, 1, (30, *hw)).astype(np.float32)
    found, expected = run(launcher, uploads, masks, tile, draw_image_hw(rng, tile))
    assert_equal(found, expected, masks[jobs_of(masks, 0.5)[:, 0]], tile)


def test_buffers_grow_when_runs_do_not_fit(
    host_launcher: HostLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise has more edges than the first buffers hold; in the end all of them are there."""
    monkeypatch.setattr(kernel_paste, "FIRST_EDGES", 16)
    monkeypatch.setattr(kernel_paste, "FIRST_BYTES", 16)
    rng = np.random.default_rng(9)
    masks = rng.uniform(0, 1, (6, 40, 40)).astype(np.float32)
    tile = Tile(np.zeros((80, 80, 3), np.uint8), (80, 80), Window(0, 0, 90, 85))
    uploads = Uploads(host_launcher)
    found, expected = run(host_launcher, uploads, masks, tile, (90, 85))
    uploads.close()
    assert_equal(found, expected, masks, tile)
    assert host_launcher.launched.count("axis_taps") == 3  # edges grew, then bytes
    assert not host_launcher.cuda.open_buffers
    assert len(host_launcher.cuda.open_streams) == 1  # the device's own, for allocations


def test_a_large_image_of_many_noisy_masks(launcher: Launcher, uploads: Uploads) -> None:
    """Enlarging, every mask pixel a run: about 10 edges a column and 500 columns."""
    rng = np.random.default_rng(10)
    masks = (rng.random((3, 50, 60)) > 0.5).astype(np.float32)
    tile = Tile(np.zeros((200, 240, 3), np.uint8), (190, 240), Window(3, 0, 400, 500))
    found, expected = run(launcher, uploads, masks, tile, (407, 500))
    assert differences(found, expected, masks, tile) == 0


@pytest.mark.slow
def test_thousands_of_masks(host_launcher: HostLauncher) -> None:
    """Byte for byte on 4000 masks, however the image was scaled, but for ties."""
    differ = total = 0
    for seed in range(100):
        rng = np.random.default_rng([1, seed])
        hw = int(rng.integers(8, 70)), int(rng.integers(8, 70))
        tile = draw_tile(rng, hw, int(rng.choice([1, 2, 4, 8])))
        masks = draw_masks(rng, 40, hw)
        uploads = Uploads(host_launcher)
        found, expected = run(host_launcher, uploads, masks, tile, draw_image_hw(rng, tile))
        uploads.close()
        differ += differences(found, expected, masks[jobs_of(masks, 0.5)[:, 0]], tile)
        total += len(found)
    assert total > 3500
    assert differ <= total / 1000
