from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.runs import read_counts
from solo_client.rle import decode_rle

RNG = np.random.default_rng(0)


def draw(height: int, width: int, share: float) -> np.ndarray[Any, Any]:
    return np.asfortranarray(RNG.random((height, width)) < share, np.uint8)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 1), (31, 17), (200, 300)])
def test_masks_come_out_as_pycocotools_wrote_them(size: tuple[int, int], share: float) -> None:
    mask = draw(*size, share)
    rle = coco_mask.encode(mask)
    for counts in (rle["counts"], rle["counts"].decode()):
        decoded = decode_rle({"size": list(size), "counts": counts})
        assert decoded.dtype == np.bool_ and decoded.flags.c_contiguous
        assert np.array_equal(decoded, mask)
        lengths = read_counts(counts, mask.size)
        assert np.array_equal(np.repeat(np.arange(lengths.size) % 2, lengths), mask.ravel("F"))


def test_large_runs_come_out() -> None:
    mask = np.zeros((6000, 5000), np.uint8, order="F")
    mask[:, 1000:4000] = 1
    assert np.array_equal(decode_rle(coco_mask.encode(mask)), mask)


@pytest.mark.parametrize(
    "counts",
    [b"", b"\0", b"/", b"p", b"\xff", "é", b"P", b"0P", b"ooooooo0", b"1" * 5, b"O", b"0O", b"~"],
)
@pytest.mark.parametrize("pixels", [0, 1, 20])
def test_damaged_counts_are_refused(counts: str | bytes, pixels: int) -> None:
    """pycocotools would go beyond its memory with most of them."""
    with pytest.raises(ValueError, match="RLE"):
        read_counts(counts, pixels)
    with pytest.raises(ValueError, match="RLE"):
        decode_rle({"size": [pixels, 1], "counts": counts})


def test_counts_that_are_cut_anywhere_are_refused() -> None:
    mask = draw(20, 30, 0.3)
    counts = coco_mask.encode(mask)["counts"]
    for length in range(len(counts)):
        with pytest.raises(ValueError, match="RLE"):
            read_counts(counts[:length], mask.size)
        with pytest.raises(ValueError, match="RLE"):
            decode_rle({"size": list(mask.shape), "counts": counts[:length]})
