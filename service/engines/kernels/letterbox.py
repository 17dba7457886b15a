"""Resize and pad on the device: `preprocess._canvas` by kernels/letterbox.cu."""

from __future__ import annotations

from pipeline.types import Window
from service.engines.kernels.launcher import Launcher


def letterbox(
    launcher: Launcher,
    image: int,
    image_hw: tuple[int, int],
    window: Window,
    canvas: int,
    canvas_hw: tuple[int, int],
    valid_hw: tuple[int, int],
    stream: int,
) -> None:
    """Queues the making of one tile's canvas, bit-equal to OpenCV's.

    Args:
        launcher: The device.
        image: Address of the image, [H, W, 3] uint8 RGB, on the device.
        image_hw: H, W.
        window: The region that the canvas shows.
        canvas: Address of [Hc, Wc, 3] uint8 on the device; all of it is written.
        canvas_hw: Hc, Wc.
        valid_hw: Rows and columns that the region becomes; the rest becomes 0.
        stream: Where it is queued.

    Raises:
        ValueError: The region is not in the image, or does not fit the canvas.
    """
    inside = window.y >= 0 and window.x >= 0 and min(window.height, window.width) > 0
    inside &= window.y + window.height <= image_hw[0] and window.x + window.width <= image_hw[1]
    if not inside:
        raise ValueError(f"{window} is not in an image of {image_hw}")
    if not (0 < valid_hw[0] <= canvas_hw[0] and 0 < valid_hw[1] <= canvas_hw[1]):
        raise ValueError(f"{valid_hw} px do not fit a canvas of {canvas_hw}")
    row_bytes = 3 * image_hw[1]
    source = image + window.y * row_bytes + 3 * window.x
    # OpenCV inverts the ratio of the sizes, and so rounds twice.
    scale_y = 1 / (valid_hw[0] / window.height)
    scale_x = 1 / (valid_hw[1] / window.width)
    sizes = (window.height, window.width, *valid_hw, canvas_hw[1])
    launcher.launch(
        "letterbox",
        (canvas_hw[1], canvas_hw[0], 1),
        (source, canvas, row_bytes, *sizes, scale_y, scale_x),
        stream,
    )
