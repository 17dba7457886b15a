"""RLE from boxes and edges against pycocotools, byte for byte."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pipeline.runs import BoxMask, build_instance, encode_box_mask, encode_edges

PARITY = Path(__file__).parents[1] / "data" / "parity"


def _boxed(mask: np.ndarray) -> BoxMask:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return BoxMask(int(rows[0]), int(columns[0]), inside.astype(bool))


def test_rle_equals_pycocotools_on_the_fixtures() -> None:
    masks = np.load(PARITY / "masks.npz")
    expected = {row["name"]: row for row in json.loads((PARITY / "rle.json").read_text())["masks"]}
    checked = 0
    for name, row in expected.items():
        if masks[name].any():
            rle = encode_box_mask(_boxed(masks[name]), masks[name].shape)
            assert rle["counts"].decode() == row["counts"], name
            checked += 1
    assert checked > 8


@pytest.mark.parametrize("seed", range(20))
def test_rle_equals_pycocotools_on_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(tuple(rng.integers(1, 30, 2))) < rng.random()
    mask[0, 0] |= not mask.any()
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    instance = build_instance(_boxed(mask), mask.shape, 0, 0.5)
    assert instance.rle["counts"] == expected["counts"]
    assert instance.area == coco_mask.area(expected)
    assert list(instance.bbox_xywh) == coco_mask.toBbox(expected).tolist()


def _edges(mask: np.ndarray) -> list[int]:
    """Starts and ends of each column's runs, independent of the implementation under test."""
    height, width = mask.shape
    found = []
    for x in range(width):
        before = False
        for y in range(height):
            if mask[y, x] != before:
                found.append(x * height + y)
                before = not before
        if before:
            found.append((x + 1) * height)
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 6), st.integers(0, 10_000))
def test_edges_of_many_masks_equal_pycocotools(h: int, w: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.random((h, w)) < rng.choice([0, 0.2, 0.8, 1]) for _ in range(count)]
    edges = [_edges(mask) for mask in masks]
    splits = np.cumsum([0, *map(len, edges)])
    found = encode_edges(np.array(list(chain.from_iterable(edges)), np.int64), splits, (h, w))
    assert len(found) == count
    for mask, outline in zip(masks, found, strict=True):
        expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        if not mask.any():
            assert outline is None
            continue
        assert outline is not None
        assert outline.rle == expected
        assert outline.area == coco_mask.area(expected)
        assert list(outline.bbox_xywh) == coco_mask.toBbox(expected).tolist()


def test_an_empty_box_mask_is_rejected() -> None:
    with pytest.raises(ValueError, match="2x3 px at y 4, x 5 is empty"):
        encode_box_mask(BoxMask(4, 5, np.zeros((2, 3), np.bool_)), (20, 20))
