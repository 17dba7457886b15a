"""Masks from COCO compressed RLE.

pycocotools decodes without checking: counts that are cut or do not fill the mask make it read and
write beyond its memory. The client imports nothing of the project, so this is here once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def decode_rle(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """The mask [H, W] of {"size": [H, W], "counts": text}.

    Raises:
        ValueError: The counts are malformed, or do not fill the mask.
    """
    height, width = rle["size"]
    lengths = _read_counts(rle["counts"], height * width)
    mask = np.repeat(np.arange(lengths.size) % 2 == 1, lengths)
    return np.ascontiguousarray(mask.reshape(width, height).T)


def _read_counts(counts: str | bytes, pixels: int) -> NDArray[np.int64]:
    """Lengths of runs, alternately of zeros and ones; 5 bits in a character, the lowest first."""
    text = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    characters = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if characters.size == 0 or characters.min() < 0 or characters.max() > 63:
        raise ValueError(f"not the counts of a compressed RLE: {text[:20]!r}")
    ends = np.flatnonzero(characters & 32 == 0)
    starts = np.append(0, ends[:-1] + 1)
    places = np.arange(characters.size) - np.repeat(starts, np.diff(starts, append=len(text)))
    if characters[-1] & 32 or places.max() > 6:
        raise ValueError(f"the counts of an RLE are cut, or too large: {text[-20:]!r}")
    lengths = np.add.reduceat((characters & 31) << (5 * places), starts)
    lengths -= ((characters[ends] & 16) << 1) << (5 * places[ends])  # the sign
    for first in (1, 2):  # each is the difference from the one before the last
        lengths[first::2] = np.cumsum(lengths[first::2])
    if lengths.min() < 0 or lengths.sum() != pixels:
        raise ValueError(f"the counts of an RLE give {lengths.sum()} pixels of {pixels}")
    return lengths
