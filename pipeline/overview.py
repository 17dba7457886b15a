"""A slide's picture with masks, reduced so that it fits on a screen, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import cv2
import numpy as np

from pipeline.draw import draw_instances
from pipeline.encode import decode_window
from pipeline.model_config import Task
from pipeline.runs import BoxMask, build_instance
from pipeline.types import Bool, Detection, UInt8, Window

MAX_SIDE_PX = 4096
"""Of the picture."""
_STRIPE_PIXELS = 1 << 24


def draw_overview(
    read: Callable[[Window], UInt8], shown: Window, instances: Iterable[Detection], task: Task
) -> UInt8:
    """Draws instances on a part of an image, reduced by a whole number.

    A pixel of the picture is the mean of the image's pixels, and belongs to a mask if any of them
    does.

    Args:
        read: The pixels [h, w, 3] of a window of the image.
        shown: The part.
        instances: Best first, in coordinates of the image.
        task: The model's.

    Returns:
        [h, w, 3] uint8 RGB.
    """
    factor = -(-max(shown.height, shown.width) // MAX_SIDE_PX)
    picture = _reduce_picture(read, shown, factor)
    reduced = (_reduce_instance(instance, shown, factor) for instance in instances)
    return draw_instances(picture, [i for i in reduced if i is not None], task)


def _reduce_picture(read: Callable[[Window], UInt8], shown: Window, factor: int) -> UInt8:
    height, width = -(-shown.height // factor), -(-shown.width // factor)
    picture = np.empty((height, width, 3), np.uint8)
    side = max(1, int(_STRIPE_PIXELS**0.5) // factor)
    for row in range(0, height, side):
        for column in range(0, width, side):
            part = picture[row : row + side, column : column + side]
            window = _enlarge(shown, factor, Window(row, column, *part.shape[:2]))
            below, right = -window.height % factor, -window.width % factor
            pixels = np.pad(read(window), ((0, below), (0, right), (0, 0)), mode="edge")
            part[:] = cv2.resize(pixels, part.shape[1::-1], interpolation=cv2.INTER_AREA)
    return picture


def _enlarge(shown: Window, factor: int, part: Window) -> Window:
    """What a part of the picture shows of the image."""
    y, x = part.y * factor, part.x * factor
    height = min(part.height * factor, shown.height - y)
    width = min(part.width * factor, shown.width - x)
    return Window(shown.y + y, shown.x + x, height, width)


def _reduce_instance(instance: Detection, shown: Window, factor: int) -> Detection | None:
    """An instance in coordinates of the picture; None if the part does not show it."""
    x, y, width, height = instance.bbox_xywh
    top, left = max(0, y - shown.y) // factor, max(0, x - shown.x) // factor
    bottom = -(-min(y + height - shown.y, shown.height) // factor)
    right = -(-min(x + width - shown.x, shown.width) // factor)
    if bottom <= top or right <= left:
        return None
    mask = np.zeros((bottom - top, right - left), np.bool_)
    rows = max(1, _STRIPE_PIXELS // ((right - left) * factor * factor))
    for row in range(0, len(mask), rows):
        part = mask[row : row + rows]
        window = _enlarge(shown, factor, Window(top + row, left, *part.shape))
        part[:] = _reduce_mask(decode_window(instance, window), factor)
    if not mask.any():
        return None
    hw = -(-shown.height // factor), -(-shown.width // factor)
    box = BoxMask(top, left, mask)
    return build_instance(box, hw, instance.label, instance.score)


def _reduce_mask(mask: UInt8, factor: int) -> Bool:
    """Whether any pixel of each square of pixels is set."""
    below, right = (-side % factor for side in mask.shape)
    padded = np.pad(mask, ((0, below), (0, right)))
    height, width = padded.shape
    squares = padded.reshape(height // factor, factor, width // factor, factor)
    return np.asarray(squares.any(axis=(1, 3)))
