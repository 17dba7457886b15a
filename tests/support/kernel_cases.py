"""Random cases for the kernels, and what the NumPy pipeline makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.postprocess import mask_stride
from pipeline.types import Candidates, Detection, Float32, Int64, Tile, Window
from service.engines.kernels.select import DeviceBatch, MaskType
from tests.support.dense_paste import axis_matrix
from tests.support.kernel_host import Uploads

TIE = 1e-6
"""Two probabilities, or two scores, closer than this may change places."""


def draw_masks(rng: np.random.Generator, count: int, hw: tuple[int, int]) -> Float32:
    """Soft blobs with ragged borders, some of which reach the mask's borders: [count, h, w]."""
    y, x = np.mgrid[: hw[0], : hw[1]].astype(np.float32)
    masks = np.empty((count, *hw), np.float32)
    for mask in masks:
        noise = cv2.GaussianBlur(
            rng.normal(size=hw).astype(np.float32), (0, 0), float(rng.uniform(0.6, 5))
        )
        radius = float(rng.uniform(1, max(hw) / 2))
        centre_y, centre_x = rng.uniform(0, hw[0]), rng.uniform(0, hw[1])
        distance = ((y - centre_y) ** 2 + (x - centre_x) ** 2) / radius**2
        logits = 2 * noise / (noise.std() + 1e-6) + 2 - 3 * np.minimum(distance, 20)
        mask[:] = 1 / (1 + np.exp(-np.maximum(logits, -40)))
    return masks


def draw_special_masks(hw: tuple[int, int]) -> Float32:
    """Empty, full, one pixel, one row, one column, borders, a chequerboard, on the threshold."""
    height, width = hw
    masks = np.zeros((10, *hw), np.float32)
    masks[1] = 0.9
    masks[2, height // 2, width // 2] = 0.8
    masks[3, height // 2] = 0.7
    masks[4, :, width // 2] = 0.7
    masks[5, 0] = masks[5, -1] = masks[5, :, 0] = masks[5, :, -1] = 0.6
    masks[6, ::2, ::2] = masks[6, 1::2, 1::2] = 0.95
    masks[7] = 0.5
    masks[7, 0, 0] = 0.75
    masks[8, 0, 0] = masks[8, -1, -1] = 1
    masks[9, :, ::2] = 1
    return masks


def narrow(masks: Float32, mask_type: MaskType) -> tuple[NDArray[Any], Float32]:
    """Masks as an engine stores them, and what these values are as fp32."""
    if mask_type == "float32":
        return masks, masks
    if mask_type == "float16":
        half = masks.astype(np.float16)
        return half, half.astype(np.float32)
    bits = (masks.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def draw_tile(rng: np.random.Generator, hw: tuple[int, int], stride: int) -> Tile:
    """A canvas for masks of h, w, partly padding, that shows a window of any size anywhere."""
    canvas = hw[0] * stride, hw[1] * stride
    valid = tuple(int(rng.integers(size // 2 + 1, size + 1)) for size in canvas)
    scale = float(np.exp(rng.uniform(-1.2, 1.2)))
    size = [max(1, round(v * scale * float(rng.uniform(0.98, 1.02)))) for v in valid]
    if rng.random() < 0.2:
        size = list(valid)
    y, x = (int(v) for v in rng.integers(0, 9, 2) * rng.integers(0, 2, 2))
    image = np.zeros((*canvas, 3), np.uint8)
    return Tile(image, (valid[0], valid[1]), Window(y, x, size[0], size[1]))


def draw_image_hw(rng: np.random.Generator, tile: Tile) -> tuple[int, int]:
    """Size of an image that holds the tile's window, often no more."""
    more = rng.integers(0, 7, 2) * rng.integers(0, 2, 2)
    window = tile.window
    return window.y + window.height + int(more[0]), window.x + window.width + int(more[1])


@dataclass(frozen=True)
class Outputs:
    """What a graph gives for a batch, on the host.

    Attributes:
        scores, labels: [B, K].
        masks: [B, K, h, w], as stored.
        mask_probs: The same values as fp32.
    """

    scores: Float32
    labels: Int64
    masks: NDArray[Any]
    mask_probs: Float32
    mask_type: MaskType

    def candidates(self, image: int) -> Candidates:
        """One image's, with its empty slots."""
        return Candidates(self.scores[image], self.labels[image], self.mask_probs[image])

    def upload(self, uploads: Uploads, release: Callable[[], None] = lambda: None) -> DeviceBatch:
        """The same on a device."""
        batch, candidates, height, width = self.masks.shape
        return DeviceBatch(
            scores=uploads.put(self.scores),
            labels=uploads.put(self.labels),
            mask_probs=uploads.put(self.masks),
            mask_type=self.mask_type,
            batch=batch,
            candidates=candidates,
            mask_hw=(height, width),
            release=release,
        )


def draw_outputs(
    rng: np.random.Generator,
    batch: int,
    candidates: int,
    hw: tuple[int, int],
    *,
    classes: int = 2,
    mask_type: MaskType = "float32",
) -> Outputs:
    """A batch as a graph gives it: ranked, the last slots of some images empty."""
    masks = draw_masks(rng, batch * candidates, hw).reshape(batch, candidates, *hw)
    # A candidate often finds what a better one has found already.
    for image in range(batch):
        for mask in range(1, candidates, 3):
            source = masks[image, rng.integers(0, mask)]
            shift = rng.integers(-2, 3, 2)
            masks[image, mask] = np.roll(source, tuple(shift), axis=(0, 1))
    scores = -np.sort(-rng.uniform(0.1, 1, (batch, candidates))).astype(np.float32)
    for image in range(1, batch):
        scores[image, rng.integers(0, candidates + 1) :] = 0
    stored, values = narrow(masks, mask_type)
    labels = rng.integers(0, classes, (batch, candidates))
    return Outputs(scores, labels, stored, values, mask_type)


def unequal(found: Sequence[Detection], expected: Sequence[Detection]) -> list[int]:
    """Indices of instances whose RLE, box or area differ."""
    assert len(found) == len(expected)
    pairs = enumerate(zip(found, expected, strict=True))
    return [
        index
        for index, (a, b) in pairs
        if (a.rle, a.bbox_xywh, a.area) != (b.rle, b.bbox_xywh, b.area)
    ]


def exact_probs(probs: Float32, tile: Tile) -> NDArray[np.float64]:
    """A mask in the window [H, W]: the pipeline's own weights, applied in double precision."""
    stride = mask_stride(tile, (probs.shape[0], probs.shape[1]))
    window = tile.window
    down = axis_matrix(probs.shape[0], stride, tile.valid_hw[0], window.height)
    across = axis_matrix(probs.shape[1], stride, tile.valid_hw[1], window.width)
    return down.astype(np.float64) @ probs.astype(np.float64) @ across.astype(np.float64).T
