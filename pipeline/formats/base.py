"""What the readers of all formats share."""

from __future__ import annotations

import struct
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

import cv2
import numpy as np

from pipeline.errors import CorruptImage, DecodeError
from pipeline.model_config import ContrastSpec
from pipeline.types import UInt8

# OpenCV would report damaged files on standard error.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

MAX_CHUNKS = 100_000
"""Of a PNG or WebP: bounds the time to go over them. Encoders write chunks of kilobytes."""
DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError),
    *(struct.error, zlib.error, cv2.error),
)
"""What readers and decoders raise on damaged files."""
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap height and width."""


@contextmanager
def damage_is_refused() -> Iterator[None]:
    """Turns what decoders raise into a `CorruptImage`."""
    try:
        yield
    except DecodeError:
        raise
    except DAMAGE as error:
        reason = error.err if isinstance(error, cv2.error) else error  # without its source file
        raise CorruptImage(f"the image is damaged or truncated: {reason}") from error


@dataclass(frozen=True)
class EncodedImage(ABC):
    """An image file of which everything but the pixels has been read.

    Attributes:
        data: The file.
        height, width: Of the stored pixels, both at least 1.
        orientation: EXIF's, 1..8: how the stored pixels are turned to be seen.
        um_per_px: Size of a pixel in micrometres, where the file states it.
    """

    data: bytes = field(repr=False)
    height: int
    width: int
    orientation: int
    um_per_px: float | None = field(default=None, kw_only=True)

    @property
    def is_deep(self) -> bool:
        """Whether `decode` applies the contrast rule, because 8 bits cannot hold the samples."""
        return False

    @property
    def upright_hw(self) -> tuple[int, int]:
        """Height and width as the image is seen."""
        hw = (self.height, self.width)
        return hw[::-1] if self.orientation in _SIDEWAYS else hw

    def decode(
        self, least_hw: tuple[int, int] = (0, 0), contrast: ContrastSpec | None = None
    ) -> UInt8:
        """The pixels [H, W, 3] RGB, upright; see `pipeline.decode.decode_image`.

        Args:
            least_hw: Height and width that suffice.
            contrast: The model's rule, applied to an image that `is_deep`.

        Raises:
            DecodeError: The image cannot be decoded.
        """
        return self.decode_stretched(least_hw, contrast)[0]

    def decode_stretched(
        self, least_hw: tuple[int, int] = (0, 0), contrast: ContrastSpec | None = None
    ) -> tuple[UInt8, UInt8 | None]:
        """As `decode`.

        Returns:
            The pixels, and of an image that `is_deep` maps [K, 256] from their intensities to
            those that a camera of 8 bits may have recorded.
        """
        stored = least_hw[::-1] if self.orientation in _SIDEWAYS else least_hw
        with damage_is_refused():
            pixels, levels = self._decode_stretched(stored, contrast)
            return turn(pixels, self.orientation), levels

    def _decode_stretched(
        self, least_hw: tuple[int, int], contrast: ContrastSpec | None
    ) -> tuple[UInt8, UInt8 | None]:
        """`decode_stretched` of the stored pixels."""
        return self._decode(least_hw, contrast), None

    @abstractmethod
    def _decode(self, least_hw: tuple[int, int], contrast: ContrastSpec | None) -> UInt8:
        """The stored pixels [H, W, 3] RGB; only a JPEG may be smaller, but not than `least_hw`.

        Raises:
            DecodeError: The image cannot be decoded.
            Exception: One of `DAMAGE`, which means that it is damaged.
        """


class FileRanges:
    """A file of which ranges of bytes are read; any number of threads may do so.

    Args:
        file: The file.
        size: Its bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        self._lock = threading.Lock()

    def read(self, start: int, length: int) -> bytes:
        """The bytes of a range; fewer where the file ends."""
        with self._lock:
            self._file.seek(start)
            return self._file.read(length)


def turn(pixels: UInt8, orientation: int) -> UInt8:
    """Stored pixels as EXIF says they are to be seen."""
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
