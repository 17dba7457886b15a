"""A JPEG 2000 file as a stack of one plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ImageTooLarge
from pipeline.formats.jpeg2000 import decode, read_jp2
from pipeline.formats.planes import Stack
from pipeline.types import Window

MAX_SAMPLES = 1 << 27
"""Of all pixels together: the decoder takes four bytes for each, whatever their depth."""


class Jpeg2000Stack:
    """A JP2 file, or a bare codestream.

    Args:
        data: The file.

    Attributes:
        height, width: Of the image.
        stack: Its samples.
        um_per_px, orientation, palette, is_inverted: As those of a `TiffStack`; there are none.
        has_alpha: The sample after the colours is an alpha that was not multiplied in.
        bits: Of a sample.
        dtype: Of the samples when they are decoded.

    Raises:
        DecodeError: The file is damaged, or of a kind that is not read.
    """

    um_per_px = None
    orientation = 1
    palette = None
    is_inverted = False

    def __init__(self, data: bytes) -> None:
        self._data = data
        found = read_jp2(data)
        self._codestream = found.codestream
        self.height, self.width = found.codestream.height, found.codestream.width
        components = found.codestream.components
        self.stack = Stack({}, 1 if components < 3 else components, is_colour=components >= 3)
        self.has_alpha = found.has_alpha and components == 4
        self.bits = found.codestream.bits
        self.dtype = found.codestream.dtype

    def plane(self, index: int) -> Jpeg2000Stack:
        """The only one: this."""
        return self

    def read(self, region: Window, samples: Sequence[int]) -> NDArray[Any]:
        """The samples [h, w, len(samples)] of a region; all of the image is decoded.

        Raises:
            ImageTooLarge: It has too many samples.
            CorruptImage: It is damaged.
        """
        count = self.height * self.width * self._codestream.components
        if count > MAX_SAMPLES:
            raise ImageTooLarge(
                f"the JPEG 2000 has {self.width}x{self.height} px of "
                f"{self._codestream.components} samples, more than {MAX_SAMPLES} samples in all"
            )
        pixels = decode(self._data, self._codestream)
        rows = slice(region.y, region.y + region.height)
        columns = slice(region.x, region.x + region.width)
        return np.ascontiguousarray(pixels[rows, columns][..., list(samples)])
