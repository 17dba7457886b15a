"""Encoded bytes -> RGB pixels, strictly: an allow-list of formats, bounds before decoding."""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.errors import CorruptImage, EmptyImage, ImageTooLarge, UnsupportedFormat
from pipeline.types import UInt8

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_JPEG_FORMATS = ("JPEG", "MPO")
MAX_PIXELS = 64_000_000
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_CAMERA_BITS = (8, 10, 12, 14, 16)
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap height and width."""
_MAX_SCANS = 50
"""A decoder goes over the whole picture for each scan, which can be ten bytes long: a file of 30 KB
can take minutes. Encoders write about ten."""
_MAX_SEGMENTS = 10_000
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""Of a JPEG; the others are stuffed bytes, fill bytes and restarts within a scan."""
_BARE_MARKERS = (b"\x01", b"\xd8")
_END, _SCAN = b"\xd9", b"\xda"
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG that its height and width follow."""
_PEEKED_SEGMENTS = 32
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError),
    *(struct.error, zlib.error),
)
"""What Pillow's readers raise on damaged files."""


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header alone."""
    if not data:
        raise EmptyImage("the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"the image is too large: {error}") from error
    except UnidentifiedImageError as error:
        start = data[:12].hex(" ")
        raise UnsupportedFormat(
            f"not an image of an allowed format ({', '.join(ALLOWED_FORMATS)}); "
            f"its {len(data)} bytes start with {start}"
        ) from error
    except _DAMAGE as error:
        raise CorruptImage(f"the image's header is damaged: {error}") from error
    check_size(image.height, image.width, max_pixels)
    return image


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Bounds width x height.

    Raises:
        ImageTooLarge: Says both and the bound.
    """
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image is {width}x{height} px, more than the {max_pixels} px allowed"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; transparency is drawn on black.

    A 16-bit grey image is scaled by the range of the least camera depth that holds its values:
    a 12-bit camera's picture does not come out all but black.
    """
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image).astype(np.float32)
        bits = int(values.max()).bit_length()
        depth = next((depth for depth in _CAMERA_BITS if depth >= bits), 16)
        scaled = np.clip(values * (255 / (2**depth - 1)) + 0.5, 0, 255).astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert always copies


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1..8; 1 if there is none or EXIF is damaged, as viewers do."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DAMAGE:
        return 1


def read_image_hw(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width from the header, before EXIF orientation; nothing is decoded.

    Raises:
        DecodeError: As `decode_image`, but for damage behind the header.
    """
    width, height = _open(data, max_pixels).size
    return height, width


def peek_hw(data: bytes) -> tuple[int, int] | None:
    """Height and width that an ordinary JPEG or PNG declares, found in microseconds.

    Nothing is checked: the decoder must be bounded by what is declared here.

    Returns:
        Before EXIF orientation; None where `read_image_hw` has to parse the header.
    """
    if data.startswith(_PNG_START) and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return (height, width) if width and height else None
    position = 2 if data.startswith(b"\xff\xd8") else len(data)
    for _ in range(_PEEKED_SEGMENTS):
        if position + 9 > len(data) or data[position] != 0xFF or data[position + 1] < 0xC0:
            return None
        marker, length = struct.unpack_from(">BH", data, position + 1)
        if marker in _SIZES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return (height, width) if width and height else None
        position += 2 + length
    return None


def read_upright_hw(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of what `decode_image` gives, as `read_image_hw` finds them."""
    image = _open(data, max_pixels)
    width, height = image.size
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def _check_scans(data: bytes) -> None:
    """Refuses a JPEG of more scans than an honest encoder writes; walks its segments.

    Raises:
        CorruptImage: Says how many are allowed.
    """
    position, scans = 2, 0
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None or found[1] == _END:
            return
        position = found.end()
        if found[1] not in _BARE_MARKERS:
            position += int.from_bytes(data[position : position + 2], "big")
        scans += found[1] == _SCAN
        if scans > _MAX_SCANS:
            raise CorruptImage(f"the JPEG has more than {_MAX_SCANS} scans")
    raise CorruptImage(f"the JPEG has more than {_MAX_SEGMENTS} segments")


def _decode_jpeg(data: bytes, image: Image.Image, least_hw: tuple[int, int]) -> UInt8 | None:
    """The stored pixels of an ordinary JPEG, the same as Pillow's in a fraction of its time.

    Args:
        data: The file.
        image: Its header.
        least_hw: See `decode_image`.

    Returns:
        [h, w, 3], or None for what is left to Pillow: other formats and colours, and damage, so
        that one library alone judges it.
    """
    if image.format not in _JPEG_FORMATS or image.mode not in ("RGB", "L"):
        return None
    height, width = least_hw[::-1] if _orientation(image) in _SIDEWAYS else least_hw
    reduce = 0 < 2 * height <= image.height and 0 < 2 * width <= image.width
    limits = {"min_height": height, "min_width": width, "min_factor": 2} if reduce else {}
    try:
        pixels = np.asarray(simplejpeg.decode_jpeg(data, "RGB", **limits), np.uint8)
    except ValueError:
        return None
    return pixels if reduce or pixels.shape[:2] == (image.height, image.width) else None


def _turn(pixels: UInt8, orientation: int) -> UInt8:
    """Stored pixels as EXIF says they are to be seen."""
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, least_hw: tuple[int, int] = (0, 0)
) -> UInt8:
    """Decodes a JPEG, PNG, WebP or BMP; of an animation the first frame.

    The format is known by content, not by name. EXIF orientation is applied; ICC profiles are
    ignored.

    Args:
        data: The file's bytes.
        max_pixels: Bound on width x height, checked before decoding.
        least_hw: Height and width that suffice, upright. A JPEG at least twice as large comes out
            at the smallest of 1/8, 2/8, 3/8 or 4/8 of its size that is not below this, which
            libjpeg computes while it decodes; 0, 0 gives every image as it is.

    Returns:
        [H, W, 3] uint8 RGB, C-contiguous.

    Raises:
        DecodeError: One of its subclasses says why.
    """
    image = _open(data, max_pixels)
    if image.format in _JPEG_FORMATS:
        _check_scans(data)
    try:
        pixels = _decode_jpeg(data, image, least_hw)
        if pixels is None:
            image.load()
            pixels = np.array(_to_rgb(image), np.uint8)
        return _turn(pixels, _orientation(image))
    except _DAMAGE as error:
        raise CorruptImage(f"the image is damaged or truncated: {error}") from error
