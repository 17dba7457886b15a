"""Encoded bytes -> RGB pixels, strictly: an allow-list of formats, bounds before decoding."""

from __future__ import annotations

from types import ModuleType

from pipeline.errors import CorruptImage, DecodeError, EmptyImage, ImageTooLarge, UnsupportedFormat
from pipeline.formats import bmp, jpeg, png, webp
from pipeline.formats.base import EncodedImage, damage_is_refused
from pipeline.formats.names import name_format
from pipeline.types import UInt8

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 64_000_000
_PEEKED_BYTES, _PEEKED_SEGMENTS = 1 << 18, 32


def _find_reader(data: bytes) -> ModuleType:
    """The module that reads a file, by the file's first bytes."""
    if data.startswith(b"\xff\xd8\xff"):
        return jpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return png
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return webp
    if data.startswith(b"BM"):
        return bmp
    if not data:
        raise EmptyImage("the image is empty (0 bytes)")
    allowed = ", ".join(ALLOWED_FORMATS)
    name = name_format(data)
    if name is not None:
        raise UnsupportedFormat(f"{name} files are not read; the allowed formats are {allowed}")
    raise UnsupportedFormat(
        f"not an image of an allowed format ({allowed}); its {len(data)} bytes start with "
        f"{data[:12].hex(' ')}"
    )


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Bounds width x height.

    Raises:
        ImageTooLarge: Says both and the bound.
    """
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image is {width}x{height} px, more than the {max_pixels} px allowed"
        )


def read_image_hw(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width from the header, before EXIF orientation; nothing is decoded.

    Raises:
        DecodeError: As `decode_image`, but for damage behind the header.
    """
    with damage_is_refused():
        height, width = _find_reader(data).read_hw(data)
    if not (height and width):
        raise CorruptImage(f"the image is {width}x{height} px by its header")
    check_size(height, width, max_pixels)
    return height, width


def peek_hw(data: bytes) -> tuple[int, int] | None:
    """Height and width that an ordinary file declares, found in microseconds.

    Returns:
        Before EXIF orientation; None where `read_image_hw` has to parse the header.
    """
    try:
        with damage_is_refused():
            start = data[:_PEEKED_BYTES]
            height, width = _find_reader(start).read_hw(start, max_segments=_PEEKED_SEGMENTS)
    except DecodeError:
        return None
    return (height, width) if height and width else None


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Reads everything of an image but its pixels.

    Raises:
        DecodeError: As `decode_image`, but for damage of the pixels.
    """
    read_image_hw(data, max_pixels=max_pixels)
    with damage_is_refused():
        image: EncodedImage = _find_reader(data).open_file(data)
    return image


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
    return open_image(data, max_pixels=max_pixels).decode(least_hw)
