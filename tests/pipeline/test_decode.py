"""What is decoded, how, and what is refused."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.decode import (
    decode_image,
    open_image,
    peek_hw,
    read_image_hw,
)
from pipeline.errors import CorruptImage, EmptyImage, ImageTooLarge, UnsupportedFormat
from pipeline.formats import convert
from pipeline.types import UInt8


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _gradient(mode: str = "RGB") -> Image.Image:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[..., 0] = np.arange(30) * 8
    pixels[..., 1] = np.arange(20)[:, None] * 12
    return Image.fromarray(pixels).convert(mode)


def _png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunk += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + chunk


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_formats_give_the_pixels(kind: str) -> None:
    got = decode_image(_encode(_gradient(), kind))
    np.testing.assert_array_equal(got, np.asarray(_gradient()))
    assert got.flags.c_contiguous and got.flags.writeable


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_give_about_the_pixels(kind: str) -> None:
    got = decode_image(_encode(_gradient(), kind, quality=95))
    assert np.abs(got.astype(int) - np.asarray(_gradient())).mean() < 8


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "I;16", "CMYK"])
def test_modes_become_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray((np.arange(600).reshape(20, 30) * 100).astype(np.uint16))
    elif mode == "LA":
        image = _gradient("L").convert("LA")
    else:
        image = _gradient(mode)
    got = decode_image(_encode(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert got.shape == (20, 30, 3) and got.dtype == np.uint8
    assert np.ptp(got) > 100


def test_sixteen_bit_is_scaled_not_clipped() -> None:
    values = np.array([[0, 32896, 65535]], np.uint16)
    got = decode_image(_encode(Image.fromarray(values), "PNG"))
    assert got[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("top", "expected"), [(255, 255), (1023, 255), (4095, 255), (2047, 127)])
def test_camera_depths_fill_the_range(top: int, expected: int) -> None:
    values = np.array([[0, top]], np.uint16)
    assert decode_image(_encode(Image.fromarray(values), "PNG"))[0, 1, 0] == expected


def test_black_sixteen_bit_stays_black() -> None:
    assert not decode_image(_encode(Image.fromarray(np.zeros((2, 3), np.uint16)), "PNG")).any()


def test_transparency_is_drawn_on_black() -> None:
    image = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    assert not decode_image(_encode(image, "PNG")).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_show_one_picture(orientation: int) -> None:
    upright = np.asarray(_gradient())
    turns: dict[int, Callable[[UInt8], UInt8]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
    got = decode_image(_encode(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(got, upright)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"\0"])
def test_damaged_exif_is_ignored(exif: bytes) -> None:
    data = _encode(_gradient(), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), np.asarray(_gradient()))


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_unknown_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encode(_gradient(), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), np.asarray(_gradient()))


def test_turned_image_swaps_its_sides_behind_the_header() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _encode(_gradient(), "JPEG", exif=exif)
    assert read_image_hw(data) == (20, 30)
    assert decode_image(data).shape == (30, 20, 3)


def test_one_pixel() -> None:
    assert decode_image(_encode(Image.new("RGB", (1, 1), "white"), "PNG")).shape == (1, 1, 3)


@pytest.mark.parametrize("kind", ["GIF", "PPM"])
def test_other_formats_are_refused_by_content(kind: str) -> None:
    with pytest.raises(UnsupportedFormat, match="JPEG, PNG, WEBP, BMP"):
        decode_image(_encode(_gradient(), kind))


def test_text_is_refused() -> None:
    with pytest.raises(UnsupportedFormat, match="68 65 6c 6c 6f"):
        decode_image(b"hello, world")


def test_empty_is_refused() -> None:
    with pytest.raises(EmptyImage, match="0 bytes"):
        decode_image(b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    rng = np.random.default_rng(0)
    data = _encode(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), kind)
    with pytest.raises(CorruptImage):
        decode_image(data[: int(len(data) * share)])


def test_huge_header_is_refused_before_decoding() -> None:
    with pytest.raises(ImageTooLarge, match="60000x60000 px"):
        decode_image(_png_header(60_000, 60_000))


def test_pixel_bound_is_the_callers() -> None:
    data = _encode(_gradient(), "PNG")
    assert read_image_hw(data, max_pixels=600) == (20, 30)
    with pytest.raises(ImageTooLarge, match="30x20 px, more than the 599 px"):
        decode_image(data, max_pixels=599)


@pytest.mark.parametrize("seed", range(200))
def test_flipped_bytes_never_escape_as_another_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kind = ["JPEG", "PNG", "WEBP", "BMP"][seed % 4]
    data = bytearray(_encode(_gradient(), kind))
    for position in rng.integers(0, len(data), 5):
        data[position] = rng.integers(0, 256)
    with contextlib.suppress(CorruptImage, UnsupportedFormat, ImageTooLarge):
        assert decode_image(bytes(data), max_pixels=100_000).shape[2] == 3


def _photo(width: int, height: int) -> Image.Image:
    """Smooth enough for a JPEG at a smaller scale to be compared with the picture itself."""
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(x + y), np.cos(x - y), np.sin(x) * np.cos(y)]
    return Image.fromarray(np.uint8(127 + 120 * np.stack(waves, axis=2)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("least_hw", "eighths"), [((100, 150), 4), ((101, 150), 8), ((60, 90), 3), ((1, 1), 1)]
)
def test_a_jpeg_is_decoded_no_larger_than_needed(
    orientation: int, least_hw: tuple[int, int], eighths: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = _photo(300, 200)
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        7: Image.Transpose.TRANSVERSE,
        **back,
    }
    stored = upright.transpose(turns[orientation]) if orientation > 1 else upright
    data = _encode(stored, "JPEG", exif=exif, quality=95, subsampling=0)
    assert open_image(data).upright_hw == (200, 300)
    got = decode_image(data, least_hw=least_hw)
    assert got.shape == (-(-200 * eighths // 8), -(-300 * eighths // 8), 3)
    wanted = np.asarray(upright.resize(got.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(got.astype(int) - wanted).mean() < 4


def test_only_jpegs_are_decoded_at_a_smaller_scale() -> None:
    data = _encode(_photo(64, 64), "PNG")
    assert decode_image(data, least_hw=(8, 8)).shape == (64, 64, 3)


def test_a_truncated_jpeg_is_refused_at_a_smaller_scale_too() -> None:
    data = _encode(_photo(300, 200), "JPEG")
    with pytest.raises(CorruptImage):
        decode_image(data[: len(data) // 2], least_hw=(20, 30))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"exif": bytes(60_000)}, {"dpi": (72, 72), "comment": b"c" * 9000}],
    ids=["baseline", "progressive", "EXIF", "comment"],
)
def test_sizes_of_ordinary_jpegs_are_read_at_once(mode: str, options: dict[str, Any]) -> None:
    data = _encode(_gradient(mode), "JPEG", **options)
    assert peek_hw(data) == (20, 30)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_the_size_of_other_formats_is_read_at_once(kind: str) -> None:
    assert peek_hw(_encode(_gradient(), kind)) == (20, 30)
    assert peek_hw(_png_header(60_000, 50_000)) == (50_000, 60_000)
    assert peek_hw(_encode(_gradient(), kind) + bytes(1_000_000)) == (20, 30)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        b"\xff\xd8",
        b"\xff\xd8\xff\xc0\0\x11\x08\0",  # cut
        b"\xff\xd8" + b"\xff\xe0\0\2" * 200_000,  # endless
        b"\xff\xd8" + b"\xff\xe0\0\0" * 20,  # lengths that cannot be
        b"\xff\xd8\xff\xda\0\x11\x08\0\1\0\1" + bytes(20),  # a scan before the size
        b"\xff\xd8\xff\xc0\0\x11\x08\0\0\0\1" + bytes(20),  # height 0
        _png_header(0, 7),
        _png_header(7, 7)[:23],
        b"\xff\xd8\xff" + b"\xff" * 300_000 + _encode(_gradient(), "JPEG")[2:],
    ],
)
def test_what_cannot_be_told_at_once_is_left_to_who_reads_headers(data: bytes) -> None:
    assert peek_hw(data) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_peek_agrees_with_the_header_or_tells_nothing_whatever_is_sent(kind: str) -> None:
    rng = np.random.default_rng(0)
    good = np.frombuffer(_encode(_gradient(), kind), np.uint8)
    for _ in range(2000):
        damaged = good.copy()
        damaged[rng.integers(0, min(len(good), 700), 3)] = rng.integers(0, 256, 3)
        data = damaged.tobytes()
        told = peek_hw(data)
        with contextlib.suppress(CorruptImage, EmptyImage, ImageTooLarge, UnsupportedFormat):
            height, width = read_image_hw(data, max_pixels=1 << 40)
            assert told in (None, (height, width))
            pixels = decode_image(data, max_pixels=100_000)
            assert pixels.shape in ((height, width, 3), (width, height, 3))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "I;16"])
def test_stripes_change_no_pixel(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    shape = {"L": (50, 40), "P": (50, 40), "LA": (50, 40, 2), "RGB": (50, 40, 3)}
    values = rng.integers(0, 256, shape.get(mode, (50, 40, 4)), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 4096, (50, 40), np.uint16))
    elif mode == "P":
        image = Image.fromarray(values).convert("P")
    else:
        image = Image.fromarray(values, mode)
    data = _encode(image, "PNG")
    whole = decode_image(data)
    for pixels in (1, 41, 200):
        monkeypatch.setattr(convert, "_STRIPE_PIXELS", pixels)
        np.testing.assert_array_equal(decode_image(data), whole)
