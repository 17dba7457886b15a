"""What the pipeline's steps hand to each other.

Symbols: H W image, Hc Wc canvas, K candidates, h w mask at the mask stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bool = NDArray[np.bool_]
UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """A region of the original image, px."""

    y: int
    x: int
    height: int
    width: int


@dataclass(frozen=True)
class Tile:
    """One canvas that the engine sees.

    Attributes:
        image: [Hc, Wc, 3] uint8 RGB, zero outside `valid_hw`.
        valid_hw: Rows and columns of the canvas that show the image.
        window: What it shows.
        shared: Depth of the strip at the top, left, bottom, right border of the window that the
            next tile shows too, image px; None where the image ends.
    """

    image: UInt8
    valid_hw: tuple[int, int]
    window: Window
    shared: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)


@dataclass(frozen=True)
class Prepared:
    """An image as its tiles, which all have one canvas size.

    Attributes:
        image_hw: Height and width of the original image, px.
        tiles: In row order; `prepare` gives a sequence that makes each tile on access.
    """

    image_hw: tuple[int, int]
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Candidates:
    """One tile's graph output, best first; a score of 0 is an empty slot.

    Attributes:
        scores: [K] float32.
        labels: [K] int64, contiguous from 0.
        mask_probs: [K, h, w] float32.
    """

    scores: Float32
    labels: Int64
    mask_probs: Float32

    @property
    def mask_hw(self) -> tuple[int, int]:
        """h, w."""
        height, width = self.mask_probs.shape[1:]
        return height, width


@dataclass(frozen=True)
class AnswerWarning:
    """Why the result of an image may be worthless although nothing failed.

    Attributes:
        code: For programs.
        message: For people.
    """

    code: str
    message: str


@dataclass(frozen=True)
class Detection:
    """One object found.

    Attributes:
        label: Contiguous from 0.
        score: In 0..1.
        rle: COCO compressed RLE of the original image, {"size": [H, W], "counts": bytes}.
        bbox_xywh: Box of the mask, px.
        area: Mask pixels.
    """

    label: int
    score: float
    rle: dict[str, Any]
    bbox_xywh: tuple[int, int, int, int]
    area: int
