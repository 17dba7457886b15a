"""An image becomes canvases: contrast, resize, pad (`reference`: the published test pipeline).

The canvas follows from the image alone, never from the batch: SOLO's grid and coordinates are
relative to it, so another canvas would give another answer.
"""

from __future__ import annotations

import cv2
import numpy as np

from service.pipeline.model_config import ContrastSpec, InputSpec, KeepRatioResize, TileResize
from service.pipeline.types import Prepared, Tile, UInt8, Window


def stretch_contrast(image: UInt8, spec: ContrastSpec) -> UInt8:
    """Maps two percentiles of the grey values to 0 and 255, all channels alike.

    Args:
        image: [H, W, 3] uint8 RGB.
        spec: Percentiles and the least range.

    Returns:
        [H, W, 3] uint8; values beyond the percentiles saturate.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    low, high = np.percentile(grey, [spec.low, spec.high])
    gain = 255.0 / max(float(high - low), spec.min_range)
    table = (np.arange(256, dtype=np.float64) - low) * gain
    table = np.clip(np.floor(table + 0.5), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(image, table), np.uint8)


def keep_ratio_size(image_hw: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width after the published resize, int(x * scale + 0.5), at least 1 px."""
    height, width = image_hw
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _canvas(part: UInt8, size: tuple[int, int], canvas_hw: tuple[int, int]) -> UInt8:
    """Resizes [h, w, 3] bilinearly to `size` and pads with zeros to [Hc, Wc, 3]."""
    canvas = np.zeros((*canvas_hw, 3), np.uint8)
    resized = part
    if part.shape[:2] != size:
        resized = cv2.resize(part, size[::-1], interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    canvas[: size[0], : size[1]] = resized
    return canvas


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of evenly spread tiles that cover `length` px with at least `overlap` px shared."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _prepare_tiles(image: UInt8, resize: TileResize) -> tuple[Tile, ...]:
    height, width = image.shape[:2]
    tiles = []
    for y in tile_starts(height, resize.tile_hw[0], resize.overlap_px):
        for x in tile_starts(width, resize.tile_hw[1], resize.overlap_px):
            h, w = min(resize.tile_hw[0], height), min(resize.tile_hw[1], width)
            size = max(1, round(h * resize.scale)), max(1, round(w * resize.scale))
            canvas = _canvas(image[y : y + h, x : x + w], size, resize.canvas_hw)
            cut = (y > 0, x > 0, y + h < height, x + w < width)
            tiles.append(Tile(canvas, size, Window(y, x, h, w), cut))
    return tuple(tiles)


def _prepare_whole(image: UInt8, resize: KeepRatioResize) -> tuple[Tile, ...]:
    height, width = image.shape[:2]
    size = keep_ratio_size((height, width), resize.short_side, resize.long_side)
    multiple = resize.pad_multiple
    canvas_hw = (-(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple)
    return (Tile(_canvas(image, size, canvas_hw), size, Window(0, 0, height, width)),)


def prepare(image: UInt8, spec: InputSpec) -> Prepared:
    """Contrast and resize rule of a model applied to one image.

    Args:
        image: [H, W, 3] uint8 RGB, H and W at least 1.
        spec: The model's input.

    Returns:
        Its canvases; all have one shape.

    Raises:
        ValueError: The array is not [H, W, 3] uint8 or has no pixels.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 [H, W, 3]")
    if spec.contrast is not None:
        image = stretch_contrast(image, spec.contrast)
    if isinstance(spec.resize, TileResize):
        tiles = _prepare_tiles(image, spec.resize)
    else:
        tiles = _prepare_whole(image, spec.resize)
    return Prepared((image.shape[0], image.shape[1]), tiles)
