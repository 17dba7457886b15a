"""JPEG 2000: the headers of a codestream and of its JP2 file; imagecodecs decodes.

OpenJPEG allocates memory for every tile, precinct and code block that the headers ask for, however
small the file is, so that these are bounded before it is called.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptImage, DecodeError, UnsupportedFormat

EXTRA = "science"
MAX_BOXES = 1000
MAX_SEGMENTS = 100_000
"""Of the headers of a codestream and of its tiles."""
MAX_TILES = 4096
MAX_COMPONENTS = 4
MAX_LAYERS = 255
_LEAST_BLOCK_PX, _LEAST_PRECINCT_PX = 256, 256
_MAX_LEVELS = 32
_SIGNATURE = b"\0\0\0\x0cjP  "
_START = b"\xff\x4f\xff\x51"
_SIZ, _COD, _COC, _TILE, _DATA, _END = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9
_GREY, _SRGB = 17, 16
_COLOURS = {18: "sYCC", 12: "CMYK", 14: "CIELAB", 20: "e-sRGB"}
_ALPHA = 1


@dataclass(frozen=True, kw_only=True)
class Codestream:
    """What the headers of a codestream tell.

    Attributes:
        start: Where it begins in the file.
        height, width: Of the image.
        components: Samples of a pixel.
        bits: Of a sample.
        is_signed: Whether samples have a sign.
        tiles: Number of tiles.
        tile_hw: Height and width of a tile, at most the image's.
    """

    start: int
    height: int
    width: int
    components: int
    bits: int
    is_signed: bool
    tiles: int
    tile_hw: tuple[int, int]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the samples when they are decoded."""
        size = 1 if self.bits <= 8 else 2 if self.bits <= 16 else 4
        return np.dtype(f"{'i' if self.is_signed else 'u'}{size}")


def is_jpeg2000(data: bytes) -> bool:
    """Whether a file begins as JP2 or as a bare codestream."""
    return data.startswith((_SIGNATURE, _START))


def read_codestream(data: bytes, start: int = 0) -> Codestream:
    """Reads and bounds the headers of a codestream and its tiles.

    Args:
        data: The file.
        start: Where the codestream begins.

    Raises:
        CorruptImage: It is damaged, or asks for too much memory.
        UnsupportedFormat: It is of a kind that is not read.
    """
    found: Codestream | None = None
    for marker, place, end in _segments(data, start):
        if marker == _SIZ and found is None:
            found = _read_size(data[place:end], start)
        elif marker in (_COD, _COC) and found is not None:
            _check_blocks(marker, data[place:end], found)
    if found is None:
        raise CorruptImage("the JPEG 2000 has no header with its size")
    return found


def _segments(data: bytes, start: int) -> Iterator[tuple[int, int, int]]:
    """Markers of the main header and of all tiles' headers, and where their content lies.

    Raises:
        CorruptImage: There are too many, or one is damaged.
    """
    position, tile_end = start + 2, 0
    for _ in range(MAX_SEGMENTS):
        marker = int.from_bytes(data[position : position + 2], "big")
        if marker == _DATA and tile_end > position:
            position = tile_end
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        end = position + 2 + length
        if marker in (_END, _DATA) or position + 4 > len(data):
            return  # the last tile, or what is missing of it, is left to the decoder
        if marker < 0xFF00 or length < 2 or end > len(data):
            raise CorruptImage(f"the JPEG 2000 is damaged at byte {position}")
        if marker == _TILE:
            if length != 10:
                raise CorruptImage(f"the JPEG 2000 is damaged at byte {position}")
            part = int.from_bytes(data[position + 6 : position + 10], "big")
            tile_end = position + part if part else len(data)
        yield marker, position + 4, end
        position = end
    raise CorruptImage(f"the JPEG 2000 has more than {MAX_SEGMENTS} header segments")


def _read_size(segment: bytes, start: int) -> Codestream:
    try:
        _, x1, y1, x0, y0, tile_w, tile_h, tile_x, tile_y, components = struct.unpack_from(
            ">H8IH", segment
        )
        if not 1 <= components <= MAX_COMPONENTS:
            raise UnsupportedFormat(f"a JPEG 2000 with {components} components is not read")
        parts = struct.unpack_from(f">{3 * components}B", segment, 36)
    except struct.error as error:
        raise CorruptImage(f"the size in the JPEG 2000 has {len(segment)} bytes") from error
    width, height = x1 - x0, y1 - y0
    if not (width > 0 and height > 0 and tile_w and tile_h and tile_x <= x0 and tile_y <= y0):
        raise CorruptImage(f"the JPEG 2000 is {width}x{height} px by its header")
    depths, steps = set(parts[::3]), {*parts[1::3], *parts[2::3]}
    if steps != {1}:
        raise UnsupportedFormat("a JPEG 2000 with subsampled colours is not read")
    if len(depths) > 1:
        raise UnsupportedFormat("a JPEG 2000 with components of different depths is not read")
    (depth,) = depths
    bits = (depth & 0x7F) + 1
    if bits > 32:
        raise UnsupportedFormat(f"a JPEG 2000 with {bits} bits is not read")
    tiles = -(-(x1 - tile_x) // tile_w) * -(-(y1 - tile_y) // tile_h)
    if tiles > MAX_TILES:
        raise CorruptImage(f"the JPEG 2000 has {tiles} tiles, more than {MAX_TILES}")
    return Codestream(
        start=start,
        height=height,
        width=width,
        components=components,
        bits=bits,
        is_signed=bool(depth & 0x80),
        tiles=tiles,
        tile_hw=(min(tile_h, height), min(tile_w, width)),
    )


def _check_blocks(marker: int, segment: bytes, size: Codestream) -> None:
    """Bounds the code blocks by their least size, the precincts by their number."""
    styles, first = (0, 5) if marker == _COD else (1, 2)
    if len(segment) < first + 5:
        raise CorruptImage(f"the coding style of the JPEG 2000 has {len(segment)} bytes")
    levels, width, height = segment[first : first + 3]
    has_precincts = segment[styles] & 1
    precincts = segment[first + 5 : first + 6 + levels] if has_precincts else b""
    if levels > _MAX_LEVELS or (has_precincts and len(precincts) <= levels):
        raise CorruptImage(
            f"the JPEG 2000 has {levels} reduced resolutions, sizes of precincts for "
            f"{len(precincts)}"
        )
    layers = int.from_bytes(segment[2:4], "big") if marker == _COD else 1
    if not 1 <= layers <= MAX_LAYERS:
        raise CorruptImage(f"the JPEG 2000 has {layers} layers, not 1..{MAX_LAYERS}")
    sides = (width & 15) + 2, (height & 15) + 2
    if 2 ** sum(sides) < _LEAST_BLOCK_PX:
        raise UnsupportedFormat(
            f"a JPEG 2000 with code blocks of {2 ** sides[0]}x{2 ** sides[1]} px is not read"
        )
    count = 0
    for level, exponents in enumerate(reversed(precincts)):
        high, wide = (side >> level for side in size.tile_hw)
        in_row = (wide >> (exponents & 15)) + 1
        count += size.tiles * in_row * ((high >> (exponents >> 4)) + 1)
    usual = 4 * size.tiles * (levels + 1)
    if count > usual + size.height * size.width // _LEAST_PRECINCT_PX:
        raise UnsupportedFormat(f"a JPEG 2000 with {count} precincts is not read")


@dataclass(frozen=True)
class Jp2:
    """A JP2 file, or a bare codestream.

    Attributes:
        codestream: The image.
        has_alpha: The last component is an alpha that was not multiplied in.
    """

    codestream: Codestream
    has_alpha: bool


def read_jp2(data: bytes) -> Jp2:
    """Reads the headers of a file.

    Raises:
        CorruptImage, UnsupportedFormat: As `read_codestream`.
    """
    if data.startswith(_START):
        return Jp2(read_codestream(data), has_alpha=False)
    has_alpha = False
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"jp2h":
            for inner, first, last in _boxes(data, start, end):
                if inner == b"colr" and data[first : first + 1] == b"\1":
                    colours = int.from_bytes(data[first + 3 : min(first + 7, last)], "big")
                    if colours not in (_GREY, _SRGB):
                        name = _COLOURS.get(colours, colours)
                        raise UnsupportedFormat(f"a JPEG 2000 with {name} colours is not read")
                elif inner == b"pclr":
                    raise UnsupportedFormat("a JPEG 2000 with a palette is not read")
                elif inner == b"cdef":
                    has_alpha = _defines_alpha(data[first:last])
        elif kind == b"jp2c":
            found = read_codestream(data, start)
            return Jp2(found, has_alpha=has_alpha and found.components in (2, 4))
    raise CorruptImage("the JPEG 2000 file has no codestream")


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Types of boxes, and where their content lies."""
    for _ in range(MAX_BOXES):
        if start + 8 > end:
            return
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        first = start + 8
        if length == 1:
            length, first = int.from_bytes(data[first : first + 8], "big"), first + 8
        last = start + length if length else end
        if not first <= last <= end:
            if kind != b"jp2c":
                raise CorruptImage(f"the JPEG 2000 is damaged at byte {start}")
            last = end  # truncated
        yield kind, first, last
        start = last
    raise CorruptImage(f"the JPEG 2000 has more than {MAX_BOXES} boxes")


def _defines_alpha(box: bytes) -> bool:
    """Whether the last component is opacity, by the box of the channels' definitions."""
    entries = list(struct.iter_unpack(">3H", box[2 : 2 + (len(box) - 2) // 6 * 6]))
    last = max((channel for channel, _, _ in entries), default=0)
    return any(channel == last and kind == _ALPHA for channel, kind, _ in entries)


def decode(data: bytes, found: Codestream) -> NDArray[Any]:
    """The pixels [H, W, S].

    Args:
        data: The file, or a codestream alone.
        found: What `read_codestream` found in it.

    Raises:
        DecodeError: It is damaged, or the decoder is not there.
    """
    try:
        import imagecodecs
    except ImportError as error:
        raise UnsupportedFormat(
            f"JPEG 2000 is read only with the extra '{EXTRA}' of solo-serve ({error})"
        ) from error
    if not imagecodecs.JPEG2K.available:
        raise UnsupportedFormat("JPEG 2000 is not read: imagecodecs was built without it")
    try:
        pixels = imagecodecs.jpeg2k_decode(data[found.start :], numthreads=1)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # of any kind
        raise CorruptImage(f"the JPEG 2000 is damaged: {error}") from error
    shape = found.height, found.width, found.components
    if pixels.size != np.prod(shape) or pixels.shape[:2] != shape[:2]:
        raise CorruptImage(f"the JPEG 2000 has the shape {pixels.shape}, not {shape}")
    return np.asarray(pixels.reshape(shape), found.dtype)
