"""Encoded bytes -> RGB pixels, strictly: an allow-list of formats, bounds before decoding."""

from __future__ import annotations

import io
from dataclasses import dataclass
from types import ModuleType

from pipeline.errors import (
    CorruptImage,
    DecodeError,
    EmptyImage,
    ImageTooLarge,
    PlaneError,
    UnsupportedFormat,
)
from pipeline.formats import bmp, jpeg, png, webp
from pipeline.formats.base import EncodedImage, damage_is_refused
from pipeline.formats.jpeg2000 import is_jpeg2000
from pipeline.formats.jpeg2000_stack import Jpeg2000Stack
from pipeline.formats.names import name_format
from pipeline.formats.picture import PlaneStack, open_picture
from pipeline.formats.planes import PlaneChoice
from pipeline.formats.stacks import START_BYTES, is_stack, open_stack
from pipeline.model_config import InputSpec
from pipeline.types import UInt8

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "JPEG 2000", "TIFF", "DICOM", "OME-Zarr in a ZIP")
MAX_PIXELS = 64_000_000
_PEEKED_BYTES, _PEEKED_SEGMENTS = 1 << 18, 32


def _find_reader(data: bytes) -> ModuleType:
    """The module that reads a file of one picture, by the file's first bytes."""
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


def _open_stack(data: bytes) -> PlaneStack | None:
    """A file that may have several planes, or deep ones; None for other files."""
    if is_jpeg2000(data):
        return Jpeg2000Stack(data)
    return open_stack(io.BytesIO(data), len(data)) if is_stack(data[:START_BYTES]) else None


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Bounds width x height.

    Raises:
        ImageTooLarge: Says both and the bound.
    """
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image is {width}x{height} px, more than the {max_pixels} px allowed"
        )


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image tells.

    Attributes:
        height, width: Before EXIF orientation.
        um_per_px: Size of a pixel in micrometres, where the file states it.
    """

    height: int
    width: int
    um_per_px: float | None = None

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Reads the header; nothing is decoded.

    Raises:
        DecodeError: As `decode_image`, but for damage behind the header.
    """
    with damage_is_refused():
        stack = _open_stack(data)
        if stack is not None:
            header = ImageHeader(stack.height, stack.width, stack.um_per_px)
        else:
            header = ImageHeader(*_find_reader(data).read_hw(data))
    if not (header.height and header.width):
        raise CorruptImage(f"the image is {header.width}x{header.height} px by its header")
    check_size(header.height, header.width, max_pixels)
    return header


def read_image_hw(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of `read_header`."""
    return read_header(data, max_pixels=max_pixels).hw


def peek_hw(data: bytes) -> tuple[int, int] | None:
    """Height and width that an ordinary file declares, found in microseconds.

    Returns:
        Before EXIF orientation; None where `read_header` has to parse the header.
    """
    if is_stack(data[:START_BYTES]) or is_jpeg2000(data):
        return None
    try:
        with damage_is_refused():
            start = data[:_PEEKED_BYTES]
            height, width = _find_reader(start).read_hw(start, max_segments=_PEEKED_SEGMENTS)
    except DecodeError:
        return None
    return (height, width) if height and width else None


def open_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, choice: PlaneChoice | None = None
) -> EncodedImage:
    """Reads everything of an image but its pixels.

    Args:
        data: The file's bytes.
        max_pixels: Bound on width x height.
        choice: Which planes of a file with several are taken.

    Raises:
        DecodeError: As `decode_image`, but for damage of the pixels.
    """
    choice = choice or PlaneChoice()
    with damage_is_refused():
        stack = _open_stack(data)
        if stack is not None:
            check_size(stack.height, stack.width, max_pixels)
            return open_picture(data, stack, choice)
    read_header(data, max_pixels=max_pixels)
    reader = _find_reader(data)
    if given := choice.named():
        raise PlaneError(
            f"{', '.join(given)}: the image has one picture; only TIFF, DICOM and OME-Zarr may "
            "have several"
        )
    with damage_is_refused():
        image: EncodedImage = reader.open_file(data)
    return image


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, least_hw: tuple[int, int] = (0, 0)
) -> UInt8:
    """Decodes an image of `ALLOWED_FORMATS`; of an animation the first frame.

    The format is known by content, not by name. EXIF orientation is applied; ICC profiles are
    ignored. Of files with several planes, see `pipeline.formats.planes`; of samples of more than 8
    bits, `pipeline.formats.stretch`.

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


def decode_for(
    image: EncodedImage, spec: InputSpec, least_hw: tuple[int, int] = (0, 0)
) -> tuple[UInt8, InputSpec, UInt8 | None]:
    """Decodes an image for a model.

    Returns:
        The pixels, the model's input as it applies to them, without the contrast rule if that was
        applied to samples of more than 8 bits, and in that case the maps of `decode_stretched`.
    """
    pixels, levels = image.decode_stretched(least_hw, spec.contrast)
    if levels is not None:
        spec = spec.model_copy(update={"contrast": None})
    return pixels, spec, levels
