"""BMP, of Windows and OS/2: read here; run lengths are decoded by OpenCV."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptImage, UnsupportedFormat
from pipeline.formats.base import EncodedImage
from pipeline.formats.convert import draw_on_black, stripes
from pipeline.model_config import ContrastSpec
from pipeline.types import UInt8

_FILE_HEADER = 14
_CORE, _INFO, _V3 = 12, 40, 56
"""Sizes of headers: OS/2's first, Windows' first, the first with a mask of transparency."""
_SIZES = (_CORE, *range(16, 65), 108, 124)
_OS2_SIZE = 64
_NONE, _RLE8, _RLE4, _MASKS, _ALPHA_MASKS = 0, 1, 2, 3, 6
_COMPRESSIONS = {
    _NONE: "no compression",
    _RLE8: "RLE8",
    _RLE4: "RLE4",
    _MASKS: "bit masks",
    4: "JPEG inside",
    5: "PNG inside",
    _ALPHA_MASKS: "bit masks with alpha",
}
_OS2_COMPRESSIONS = {3: "Huffman 1D", 4: "RLE24"}
_DEPTHS = {
    _NONE: (1, 2, 4, 8, 16, 24, 32),
    _RLE8: (8,),
    _RLE4: (4,),
    _MASKS: (16, 24, 32),
    _ALPHA_MASKS: (16, 32),
}
"""Bits of a pixel that are read, for each compression."""
_BGR = (0xFF0000, 0xFF00, 0xFF)
_USUAL_MASKS = {16: (0x7C00, 0x3E0, 0x1F), 24: _BGR, 32: _BGR}

Channel = tuple[int, int]
"""Least bit and number of bits of a colour in a pixel."""


@dataclass(frozen=True)
class Bmp(EncodedImage):
    """A BMP.

    Attributes:
        bits: Of a pixel.
        compression: As in the file.
        offset: Where the pixels begin.
        is_top_down: The first row is the top one.
        palette: [256, 3] RGB; black where the file has no colour.
        channels: Red, green, blue and perhaps alpha of a pixel of more than 8 bits; () where it is
            blue, green and red of 8 bits each.
    """

    bits: int
    compression: int
    offset: int
    is_top_down: bool
    palette: UInt8 = field(repr=False)
    channels: tuple[Channel, ...]

    def _decode(self, least_hw: tuple[int, int], contrast: ContrastSpec | None) -> UInt8:
        if self.compression in (_RLE8, _RLE4):
            return self._decode_run_lengths()
        self._check_length()
        has_alpha = len(self.channels) == 4 and self._is_any_visible()
        channels = self.channels if has_alpha else self.channels[:3]
        pixels = np.empty((self.height, self.width, 3), np.uint8)
        filled = pixels if self.is_top_down else pixels[::-1]
        for rows in stripes(self.height, self.width):
            stored = self._read_rows(rows)
            if self.bits <= 8:
                filled[rows] = self.palette[self._unpack(stored)]
            elif not self.channels:
                filled[rows] = stored[:, : 3 * self.width].reshape(-1, self.width, 3)[..., ::-1]
            else:
                parts = [_scale(self._read_values(stored), channel) for channel in channels]
                colours = np.stack(parts, axis=2)
                filled[rows] = draw_on_black(colours) if has_alpha else colours
        return pixels

    @property
    def _stride(self) -> int:
        """Bytes of a stored row."""
        return (self.width * self.bits + 31) // 32 * 4

    def _check_length(self) -> None:
        needed = self._stride * (self.height - 1) + (self.width * self.bits + 7) // 8
        there = len(self.data) - self.offset
        if there < needed:
            raise CorruptImage(
                f"the BMP is truncated: {max(0, there)} bytes of pixels, {needed} are needed"
            )

    def _read_rows(self, rows: slice) -> UInt8:
        """Stored rows [h, stride]; the last row of a file may lack its padding."""
        start = self.offset + rows.start * self._stride
        length = (rows.stop - rows.start) * self._stride
        part = self.data[start : start + length].ljust(length, b"\0")
        return np.frombuffer(part, np.uint8).reshape(-1, self._stride)

    def _read_values(self, stored: UInt8) -> NDArray[np.unsignedinteger]:
        """Pixels [h, W] of stored rows of more than 8 bits a pixel."""
        if self.bits == 24:
            wide = np.zeros((len(stored), self.width, 4), np.uint8)
            wide[..., :3] = stored[:, : 3 * self.width].reshape(-1, self.width, 3)
            return wide.view("<u4")[..., 0]
        return stored.view("<u2" if self.bits == 16 else "<u4")[:, : self.width]

    def _unpack(self, stored: UInt8) -> UInt8:
        """Indices [h, W] of stored rows of at most 8 bits a pixel."""
        if self.bits == 8:
            return stored[:, : self.width]
        shifts = np.arange(8 - self.bits, -1, -self.bits, dtype=np.uint8)
        indices = (stored[:, :, None] >> shifts) & np.uint8(2**self.bits - 1)
        return indices.reshape(len(stored), -1)[:, : self.width]

    def _is_any_visible(self) -> bool:
        """Whether any pixel's alpha is not 0; programs that know no transparency write 0."""
        start, bits = self.channels[3]
        mask = (2**bits - 1) << start
        return bits > 0 and any(
            (self._read_values(self._read_rows(rows)) & mask).any()
            for rows in stripes(self.height, self.width)
        )

    def _decode_run_lengths(self) -> UInt8:
        """Has OpenCV decode the indices, as grey values of a file with the same run lengths."""
        colours = 2**self.bits
        greys = b"".join(bytes((i, i, i, 0)) for i in range(colours))
        offset = _FILE_HEADER + _INFO + len(greys)
        runs = self.data[self.offset :]
        header = struct.pack("<2sIII", b"BM", offset + len(runs), 0, offset)
        header += struct.pack("<IiiHH", _INFO, self.width, self.height, 1, self.bits)
        header += struct.pack("<IIiiII", self.compression, len(runs), 0, 0, colours, 0)
        file = np.frombuffer(b"".join([header, greys, runs]), np.uint8)
        indices = cv2.imdecode(file, cv2.IMREAD_GRAYSCALE)
        if indices is None or indices.shape != (self.height, self.width):
            raise CorruptImage("the BMP's run lengths are damaged or truncated")
        pixels = np.empty((self.height, self.width, 3), np.uint8)
        filled = pixels[::-1] if self.is_top_down else pixels  # OpenCV gave the first row last
        for rows in stripes(self.height, self.width):
            filled[rows] = self.palette[indices[rows]]
        return pixels


def _scale(values: NDArray[np.unsignedinteger], channel: Channel) -> UInt8:
    """A channel of pixels [h, W], in 0..255."""
    start, bits = channel
    if bits == 0:
        return np.zeros(values.shape, np.uint8)
    part = (values >> start) & (2**bits - 1)
    scaled = part if bits == 8 else part * (255 / (2**bits - 1)) + 0.5
    return np.asarray(scaled, np.uint8)


def read_hw(data: bytes, *, max_segments: int = 0) -> tuple[int, int]:
    """Height and width that the header declares."""
    height, width, *_ = _read_size(data)
    return abs(height), width


def _read_size(data: bytes) -> tuple[int, int, int, int, int]:
    """Height (negative: top down), width, bits of a pixel, size of the header, offset of pixels."""
    offset, size = struct.unpack_from("<II", data.ljust(_FILE_HEADER + 4, b"\0"), 10)
    if len(data) >= _FILE_HEADER + 4 and size not in _SIZES:
        raise UnsupportedFormat(f"the file starts like a BMP, but with a header of {size} bytes")
    if len(data) < _FILE_HEADER + max(_CORE, size):
        raise CorruptImage(f"the BMP ends within its header, after {len(data)} bytes")
    layout = "<HHHH" if size == _CORE else "<iiHH"
    width, height, _, bits = struct.unpack_from(layout, data, 18)
    if width < 0:
        raise CorruptImage(f"the BMP has a width of {width} px")
    if 0 < offset < _FILE_HEADER + size:
        raise CorruptImage(f"the BMP's pixels begin at byte {offset}, within its header")
    return height, width, bits, size, offset


def open_file(data: bytes) -> Bmp:
    """Reads the header and the palette."""
    height, width, bits, size, offset = _read_size(data)
    fields = data[30 : _FILE_HEADER + size] if size > _CORE else b""
    compression, *_, colours, _ = struct.unpack_from("<IIiiII", fields.ljust(24, b"\0"))
    is_os2 = size == _OS2_SIZE
    if bits not in _DEPTHS.get(compression, ()) or (is_os2 and compression in _OS2_COMPRESSIONS):
        names = _COMPRESSIONS | (_OS2_COMPRESSIONS if is_os2 else {})
        raise UnsupportedFormat(
            f"the BMP has {bits} bits a pixel and compression {compression} "
            f"({names.get(compression, 'unknown')}), which is not supported"
        )
    behind = _FILE_HEADER + size
    channels: tuple[Channel, ...] = ()
    if bits > 8 and (bits != 24 or compression != _NONE):
        channels = _read_channels(data, bits, compression, size)
        behind = max(behind, {_MASKS: 66, _ALPHA_MASKS: 70}.get(compression, 0))
    entry = 3 if size == _CORE else 4
    entries = min(colours or 2**bits, 2**bits) if bits <= 8 else 0
    end = behind + entry * entries
    palette = _read_palette(data[behind:end], entry)
    return Bmp(
        data, abs(height), width, 1, bits, compression, offset or end, height < 0, palette, channels
    )


def _read_palette(data: bytes, entry: int) -> UInt8:
    colours = np.zeros((256, 3), np.uint8)
    there = len(data) // entry
    stored = np.frombuffer(data, np.uint8, there * entry).reshape(there, entry)
    colours[:there] = stored[:, 2::-1]
    return colours


def _read_channels(data: bytes, bits: int, compression: int, size: int) -> tuple[Channel, ...]:
    """Red, green, blue; and alpha, whose mask may be in the header where theirs are not."""
    masks: tuple[int, ...] = ()
    has_alpha = compression == _ALPHA_MASKS or (size >= _V3 and size != _OS2_SIZE)
    if len(data) < 70 and (has_alpha or compression != _NONE):
        raise CorruptImage(f"the BMP ends within its bit masks, after {len(data)} bytes")
    if compression != _NONE:
        masks = struct.unpack_from("<3I", data, 54)
    if not any(masks):
        masks = _USUAL_MASKS[bits]
    if has_alpha:
        masks += struct.unpack_from("<I", data, 66)
    return tuple(_find_channel(mask & (2**bits - 1)) for mask in masks)


def _find_channel(mask: int) -> Channel:
    start = (mask & -mask).bit_length() - 1 if mask else 0
    bits = mask.bit_length() - start
    if mask != (2**bits - 1) << start:
        raise CorruptImage(f"the BMP's bit mask {mask:#x} has a gap")
    return start, bits
