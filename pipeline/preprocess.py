"""An image becomes canvases: contrast, resize, pad (`reference`: the published test pipeline).

The canvas follows from the image alone, never from the batch: SOLO's grid and coordinates are
relative to it, so another canvas would give another answer.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.model_config import ContrastSpec, InputSpec, KeepRatioResize, TileResize
from pipeline.types import Prepared, Tile, UInt8, Window


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
    canvas = np.empty((*canvas_hw, 3), np.uint8)
    canvas[size[0] :] = canvas[:, size[1] :] = 0
    shown = canvas[: size[0], : size[1]]
    assert shown.shape[:2] == size
    if part.shape[:2] == size:
        shown[:] = part
    else:  # into its place: no copy
        cv2.resize(part, size[::-1], dst=shown, interpolation=cv2.INTER_LINEAR)
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


def _prepare_whole(
    image: UInt8, resize: KeepRatioResize, image_hw: tuple[int, int]
) -> tuple[Tile, ...]:
    size = keep_ratio_size(image_hw, resize.short_side, resize.long_side)
    multiple = resize.pad_multiple
    canvas_hw = (-(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple)
    return (Tile(_canvas(image, size, canvas_hw), size, Window(0, 0, *image_hw)),)


def needed_hw(image_hw: tuple[int, int], spec: InputSpec) -> tuple[int, int]:
    """Size at which a model looks at an image; decoding more pixels than that is not needed.

    Returns:
        Height and width; 0, 0 where the model needs the image as it is.
    """
    if isinstance(spec.resize, TileResize):
        return 0, 0
    return keep_ratio_size(image_hw, spec.resize.short_side, spec.resize.long_side)


def prepare(image: UInt8, spec: InputSpec, *, image_hw: tuple[int, int] | None = None) -> Prepared:
    """Contrast and resize rule of a model applied to one image.

    Args:
        image: [H, W, 3] uint8 RGB, H and W at least 1.
        spec: The model's input.
        image_hw: Height and width of the original, if `image` was decoded at a smaller scale
            (see `needed_hw`). Instances are in its coordinates.

    Returns:
        Its canvases; all have one shape.

    Raises:
        ValueError: The array is not [H, W, 3] uint8 or has no pixels, or it is not the original
            and the model needs that.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 [H, W, 3]")
    shape_hw = (image.shape[0], image.shape[1])
    image_hw = image_hw or shape_hw
    if spec.contrast is not None:
        image = stretch_contrast(image, spec.contrast)
    if isinstance(spec.resize, TileResize):
        if image_hw != shape_hw:
            raise ValueError(f"tiles are cut from the image of {image_hw}, not from {shape_hw}")
        tiles = _prepare_tiles(image, spec.resize)
    else:
        tiles = _prepare_whole(image, spec.resize, image_hw)
    return Prepared(image_hw, tiles)
