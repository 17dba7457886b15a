"""Label images: the value of a pixel is the number of its instance, from 1; 0 is background."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.encode import decode_window
from pipeline.errors import WriteError
from pipeline.overlaps import resolve_overlaps
from pipeline.types import Window
from pipeline.writers.page import Classes, Page

MAX_PNG_PIXELS = 1 << 28
"""A PNG is made of the whole picture."""
_TIFF_TILE_PX = 512
_MOST_CLASSIC_BYTES = 1 << 31
"""Pixels of more bytes are written as BigTIFF."""


class LabelImage:
    """The label image of the instances that `overlaps=resolve` leaves, in their order.

    Args:
        page: The instances.

    Attributes:
        image_hw: Height and width.
        dtype: uint16, or uint32 for more than 65,535 instances.
        instances: Those that are left.
    """

    def __init__(self, page: Page) -> None:
        self.image_hw = page.image_hw
        self.instances = resolve_overlaps(page.instances)
        is_small = len(self.instances) <= np.iinfo(np.uint16).max
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if is_small else np.uint32)
        boxes = np.array([i.bbox_xywh for i in self.instances], np.int64).reshape(-1, 4)
        self._starts, self._ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]

    def iterate_tiles(self, side: int) -> Iterator[tuple[Window, NDArray[Any]]]:
        """The pixels [h, w] of the tiles of a side, row by row; the last ones may be smaller."""
        height, width = self.image_hw
        for y in range(0, height, side):
            end = min(y + side, height)
            near = np.flatnonzero((self._starts[:, 1] < end) & (self._ends[:, 1] > y))
            for x in range(0, width, side):
                window = Window(y, x, end - y, min(side, width - x))
                inside = self._starts[near, 0] < x + window.width
                inside &= self._ends[near, 0] > x
                yield window, self._draw(window, near[inside])

    def _draw(self, window: Window, numbers: NDArray[np.int64]) -> NDArray[Any]:
        pixels = np.zeros((window.height, window.width), self.dtype)
        origin = window.x, window.y
        for number in numbers:
            left, top = np.maximum(self._starts[number], origin)
            right, bottom = np.minimum(
                self._ends[number], (window.x + window.width, window.y + window.height)
            )
            part = Window(int(top), int(left), int(bottom - top), int(right - left))
            mask = decode_window(self.instances[number], part)
            rows = slice(top - window.y, bottom - window.y)
            columns = slice(left - window.x, right - window.x)
            pixels[rows, columns][mask > 0] = number + 1
        return pixels


def write_png(page: Page, file: BinaryIO) -> None:
    """A PNG of 16 bits.

    Raises:
        WriteError: There are too many instances or pixels for it.
    """
    height, width = page.image_hw
    if height * width > MAX_PNG_PIXELS:
        raise WriteError(
            f"the image has {width}x{height} px; the format labels holds {MAX_PNG_PIXELS} px, "
            "ome-tiff and ome-zarr have no such bound"
        )
    labels = LabelImage(page)
    if labels.dtype != np.uint16:
        raise WriteError(
            f"{len(labels.instances)} instances do not fit into a PNG of 16 bits; the format "
            "ome-tiff has 32 bits"
        )
    ((_, pixels),) = labels.iterate_tiles(max(height, width))
    Image.fromarray(pixels).save(file, "PNG", compress_level=3)


def write_ome_tiff(page: Page, file: BinaryIO) -> None:
    """A tiled OME-TIFF of 16 bits, or of 32 for more than 65,535 instances.

    Raises:
        ImportError: tifffile is not installed.
    """
    import tifffile

    labels = LabelImage(page)
    metadata: dict[str, object] = {"axes": "YX", "UUID": f"urn:uuid:{_identify(labels)}"}
    if page.um_per_px is not None:
        metadata |= {f"PhysicalSize{axis}": page.um_per_px for axis in "XY"}
        metadata |= {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    height, width = labels.image_hw
    tifffile.imwrite(
        file,
        (pad_tile(pixels, _TIFF_TILE_PX) for _, pixels in labels.iterate_tiles(_TIFF_TILE_PX)),
        shape=labels.image_hw,
        dtype=labels.dtype,
        tile=(_TIFF_TILE_PX, _TIFF_TILE_PX),
        bigtiff=height * width * labels.dtype.itemsize > _MOST_CLASSIC_BYTES,
        ome=True,
        compression="zlib",
        maxworkers=1,
        metadata=metadata,
    )


def _identify(labels: LabelImage) -> uuid.UUID:
    """The same for the same content; tifffile's own UUID has the time and the machine's address."""
    content = hashlib.sha256(repr(labels.image_hw).encode())
    for instance in labels.instances:
        content.update(instance.rle["counts"] + b"\n")
    return uuid.uuid5(uuid.NAMESPACE_OID, content.hexdigest())


def pad_tile(pixels: NDArray[Any], side: int) -> NDArray[Any]:
    """The pixels [h, w] with background to the right and below, up to a tile's side."""
    below, right = (side - length for length in pixels.shape)
    return np.pad(pixels, ((0, below), (0, right)))


def list_classes(classes: Classes) -> dict[str, bytes]:
    """The class of a data set with one."""
    return {"classes.txt": f"{classes[0].name}\n".encode()} if len(classes) == 1 else {}
