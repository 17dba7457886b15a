"""JPEG 2000 as a file: right pixels, and bounds on what its headers ask for."""

from __future__ import annotations

import builtins
import io
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.decode import decode_image, open_image, peek_hw, read_header
from pipeline.errors import CorruptImage, DecodeError, ImageTooLarge, UnsupportedFormat
from pipeline.formats import jpeg2000_stack
from pipeline.formats.jpeg2000 import MAX_BOXES, MAX_LAYERS, MAX_SEGMENTS, MAX_TILES
from pipeline.formats.planes import PlaneChoice
from pipeline.types import Window

imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra science")

RNG = np.random.default_rng(5)
COLOUR = RNG.integers(0, 256, (60, 90, 3)).astype(np.uint8)
GREY = COLOUR[..., 0]
SIZ = 4
"""Where the length of the segment with the sizes is, in a bare codestream."""


def encode(pixels: NDArray[Any], *, jp2: bool = False, **options: Any) -> bytes:
    kind = "jp2" if jp2 else "j2k"
    data: bytes = imagecodecs.jpeg2k_encode(pixels, level=0, codecformat=kind, **options)
    return data


def save(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG2000", no_jp2=True, **options)
    return buffer.getvalue()


def resize(data: bytes, width: int, height: int, tile_w: int, tile_h: int) -> bytes:
    """Other sizes in the header of a bare codestream."""
    changed = bytearray(data)
    struct.pack_into(">8I", changed, SIZ + 4, width, height, 0, 0, tile_w, tile_h, 0, 0)
    return bytes(changed)


def put(data: bytes, place: int, *values: int) -> bytes:
    changed = bytearray(data)
    changed[place : place + len(values)] = values
    return bytes(changed)


def as_rgb(grey: NDArray[Any]) -> NDArray[np.uint8]:
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize("jp2", [True, False])
def test_the_pixels_are_those_of_the_file(jp2: bool) -> None:
    data = encode(COLOUR, jp2=jp2)
    np.testing.assert_array_equal(decode_image(data), COLOUR)
    assert read_header(data).hw == (60, 90) and peek_hw(data) is None
    np.testing.assert_array_equal(decode_image(encode(GREY, jp2=jp2)), as_rgb(GREY))
    green = open_image(data, choice=PlaneChoice("1")).decode()
    np.testing.assert_array_equal(green, as_rgb(COLOUR[..., 1]))


def test_tiles_layers_and_precincts_of_encoders_are_read() -> None:
    options: tuple[dict[str, Any], ...] = (
        {"tile_size": (32, 32)},
        {"num_resolutions": 3, "precinct_size": (64, 64), "codeblock_size": (16, 16)},
        {"quality_layers": [20, 10, 0], "progression": "RPCL"},
    )
    for chosen in options:
        np.testing.assert_array_equal(decode_image(save(COLOUR, **chosen)), COLOUR)


@pytest.mark.parametrize(
    ("dtype", "bits"), [("u1", 4), ("i1", 8), ("u2", 12), ("u2", 16), ("i2", 16)]
)
def test_every_depth(dtype: str, bits: int) -> None:
    low = -(2 ** (bits - 1)) if dtype[0] == "i" else 0
    values = RNG.integers(low, low + 2**bits, (60, 90)).astype(dtype)
    image = open_image(encode(values, bitspersample=bits))
    found = image.read(Window(3, 5, 40, 30))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found[..., 0], values[3:43, 5:35])
    assert image.is_deep == (dtype != "u1")
    if bits == 4:
        np.testing.assert_array_equal(image.decode(), as_rgb(values * 17))


def test_alpha_counts_where_the_file_says_that_it_is_one() -> None:
    alpha = np.where(np.arange(90) < 40, 255, 0).astype(np.uint8)
    both = np.dstack([COLOUR, np.broadcast_to(alpha, (60, 90))])
    np.testing.assert_array_equal(decode_image(encode(both, jp2=True)), COLOUR)
    buffer = io.BytesIO()
    Image.fromarray(both).save(buffer, "JPEG2000")
    data = buffer.getvalue()
    assert b"cdef" in data
    np.testing.assert_array_equal(decode_image(data), np.where(alpha[:, None] > 0, COLOUR, 0))


def test_without_the_decoder_the_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(COLOUR)
    with monkeypatch.context() as patched:
        patched.setattr(imagecodecs.JPEG2K, "available", False)
        with pytest.raises(UnsupportedFormat, match="JPEG 2000 is not read: imagecodecs was built"):
            decode_image(data)
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "imagecodecs":
            raise ImportError("No module named 'imagecodecs'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UnsupportedFormat, match="JPEG 2000 is read only with the extra 'science'"):
        decode_image(data)


@pytest.mark.parametrize(
    ("data", "error", "why"),
    [
        (resize(encode(GREY), 8001, 8001, 8001, 8001), ImageTooLarge, "8001x8001 px"),
        (resize(encode(GREY), 90, 0, 90, 60), CorruptImage, "90x0 px"),
        (resize(encode(GREY), 90, 60, 0, 60), CorruptImage, "px"),
        (resize(encode(GREY), 650, 640, 10, 10), CorruptImage, f"than {MAX_TILES}"),
        (put(encode(GREY), SIZ + 36, 0, 9), UnsupportedFormat, "9 components"),
        (put(encode(GREY), SIZ + 39, 2), UnsupportedFormat, "subsampled"),
        (put(encode(COLOUR), SIZ + 41, 11), UnsupportedFormat, "different depths"),
        (put(encode(GREY), SIZ + 38, 37), UnsupportedFormat, "38 bits"),
        (encode(GREY)[:30], CorruptImage, "damaged at byte 2"),
        (encode(GREY)[:4], CorruptImage, "no header with its size"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", CorruptImage, "no codestream"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x08free" * MAX_BOXES, CorruptImage, "boxes"),
        (encode(GREY)[:45] + b"\xff\x64\0\2" * MAX_SEGMENTS, CorruptImage, "header segments"),
    ],
)  # fmt: skip
def test_headers_are_bounded(data: bytes, error: type[DecodeError], why: str) -> None:
    with pytest.raises(error, match=why):
        open_image(data)


def find_style(data: bytes) -> int:
    return data.index(b"\xff\x52") + 4


def test_code_blocks_precincts_and_layers_are_bounded() -> None:
    """The decoder allocates memory for each, whatever there is in the file."""
    data = encode(GREY)
    style = find_style(data)
    with pytest.raises(UnsupportedFormat, match="code blocks of 4x4 px"):
        open_image(put(data, style + 6, 0, 0))
    with pytest.raises(CorruptImage, match=f"65535 layers, not 1..{MAX_LAYERS}"):
        open_image(put(data, style + 2, 255, 255))
    with pytest.raises(CorruptImage, match="200 reduced"):
        open_image(put(data, style + 5, 200))
    with pytest.raises(CorruptImage, match="sizes of precincts for 0"):
        open_image(put(data, style, 1))
    small = save(GREY, num_resolutions=2, precinct_size=(32, 32), codeblock_size=(16, 16))
    np.testing.assert_array_equal(decode_image(small), as_rgb(GREY))
    style = find_style(small)
    large = resize(put(small, style + 10, 0, 0), 4000, 4000, 4000, 4000)
    with pytest.raises(UnsupportedFormat, match="precincts is not read"):
        open_image(large)


def test_colours_and_palettes_of_other_kinds_are_named() -> None:
    data = encode(COLOUR, jp2=True)
    colours = data.index(b"colr") + 4
    for number, name in ((18, "sYCC"), (12, "CMYK"), (99, "99")):
        with pytest.raises(UnsupportedFormat, match=f"with {name} colours"):
            open_image(put(data, colours + 3, 0, 0, 0, number))
    with pytest.raises(UnsupportedFormat, match="palette"):
        open_image(data.replace(b"colr", b"pclr"))


def test_samples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg2000_stack, "MAX_SAMPLES", 3 * 60 * 90 - 1)
    np.testing.assert_array_equal(decode_image(encode(GREY)), as_rgb(GREY))
    with pytest.raises(ImageTooLarge, match="90x60 px of 3 samples"):
        decode_image(encode(COLOUR))


def test_damage_is_damage() -> None:
    good = [encode(COLOUR, jp2=True), save(COLOUR, tile_size=(32, 32))]
    for data in good:
        for cut in range(5, len(data) - 1, 499):
            with pytest.raises(DecodeError):
                decode_image(data[:cut])
    for number in range(300):
        chance = np.random.default_rng(number)
        damaged = bytearray(good[number % 2])
        for place in chance.integers(12, 300, 4):
            damaged[place] = chance.integers(256)
        try:
            decode_image(bytes(damaged), max_pixels=10**6)
        except DecodeError as error:
            str(error)
