"""BMP of every header, depth and compression, and damaged."""

from __future__ import annotations

import struct
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.decode import decode_image, read_image_hw
from pipeline.errors import CorruptImage, ImageTooLarge, UnsupportedFormat
from tests.support.image_files import build_bmp, insert, pack_bits

HEIGHT, WIDTH = 13, 21
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3))
BGR = PIXELS[..., ::-1].reshape(HEIGHT, -1).astype(np.uint8)
GOOD = build_bmp(BGR, WIDTH, HEIGHT, 24)
HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
MASKS_32 = (0xFF0000, 0xFF00, 0xFF)
ALPHA_32 = (*MASKS_32, 0xFF000000)


def pack_values(masks: tuple[int, ...], bits: int, alpha: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Rows of pixels whose channels are in the bits of masks."""
    values = np.zeros((HEIGHT, WIDTH), np.uint64)
    for mask, channel in zip(masks, [*np.moveaxis(PIXELS, 2, 0), alpha], strict=False):
        depth, start = mask.bit_count(), (mask & -mask).bit_length() - 1 if mask else 0
        part = channel * (2**depth - 1) // 255
        values |= part.astype(np.uint64) << np.uint64(start)
    packed = values.astype("<u4").view(np.uint8).reshape(HEIGHT, WIDTH, 4)
    return packed[..., : bits // 8].reshape(HEIGHT, -1)


def quantise(masks: tuple[int, ...]) -> NDArray[np.float64]:
    """The pixels with as many levels as the masks have."""
    tops = np.array([max(2 ** mask.bit_count() - 1, 1) for mask in masks[:3]])
    return np.asarray((PIXELS * tops // 255) * (255 / tops))


def run_lengths(indices: NDArray[np.int64], bits: int) -> bytes:
    """RLE8 or RLE4 with runs, pairs of pixels, and stretches of pixels as they are."""
    coded = bytearray()
    for row in indices[::-1]:
        position = 0
        while position < len(row):
            rest = row[position:]
            same = int(np.argmax(np.append(rest != rest[0], True)))
            if same >= 2 or len(rest) < 3:
                value = int(rest[0])
                coded += bytes([same, value if bits == 8 else value << 4 | value])
                position += same
            else:
                count = min(7, len(rest))
                data = pack_bits(rest[None, :count], bits).tobytes()
                coded += bytes([0, count]) + data + bytes(len(data) % 2)
                position += count
        coded += b"\0\0"
    return bytes(coded) + b"\0\1"


@pytest.mark.parametrize("header_bytes", HEADERS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes(bits: int, header_bytes: int) -> None:
    palette = RNG.integers(0, 256, (2**bits, 3)).astype(np.uint8)
    indices = RNG.integers(0, 2**bits, (HEIGHT, WIDTH))
    packed = pack_bits(indices, bits)
    data = build_bmp(packed, WIDTH, HEIGHT, bits, header_bytes=header_bytes, palette=palette)
    np.testing.assert_array_equal(decode_image(data), palette[indices])


def test_a_palette_may_be_short_and_what_it_lacks_is_black() -> None:
    palette = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    packed = np.array([[0, 1, 2, 255]], np.uint8)
    data = build_bmp(packed, 4, 1, 8, palette=palette, colours=2)
    assert decode_image(data)[0].tolist() == [[10, 20, 30], [40, 50, 60], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("colours", [257, 300, 2**32 - 1])
def test_a_palette_may_say_to_be_larger_than_it_can_be(colours: int) -> None:
    palette = RNG.integers(0, 256, (256, 3)).astype(np.uint8)
    indices = RNG.integers(0, 256, (HEIGHT, WIDTH))
    packed = pack_bits(indices, 8)
    data = build_bmp(packed, WIDTH, HEIGHT, 8, palette=palette, colours=colours)
    np.testing.assert_array_equal(decode_image(data), palette[indices])


@pytest.mark.parametrize("header_bytes", [12, 16, 40, 64, 108, 124])
def test_24_bits(header_bytes: int) -> None:
    data = build_bmp(BGR, WIDTH, HEIGHT, 24, header_bytes=header_bytes)
    np.testing.assert_array_equal(decode_image(data), PIXELS)
    assert read_image_hw(data) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("bits", [8, 24])
def test_rows_may_go_down(bits: int) -> None:
    rows = BGR if bits == 24 else BGR[:, :WIDTH]
    palette = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1) if bits == 8 else None
    data = build_bmp(rows, WIDTH, HEIGHT, bits, palette=palette, is_top_down=True)
    expected = PIXELS if bits == 24 else rows[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(decode_image(data), expected)


@pytest.mark.parametrize(
    ("bits", "header_bytes", "compression", "masks"),
    [
        (16, 40, 0, (0x7C00, 0x3E0, 0x1F)),
        (16, 108, 0, (0x7C00, 0x3E0, 0x1F)),
        (16, 40, 3, (0xF800, 0x7E0, 0x1F)),
        (16, 52, 3, (0xF800, 0x7E0, 0x1F)),
        (16, 124, 3, (0xF800, 0x7E0, 0x1F)),
        (16, 40, 3, (0xF00, 0xF0, 0xF)),
        (16, 40, 3, (0x1F, 0x3E0, 0x7C00)),
        (16, 40, 3, (0xE000, 0x1C00, 0x380)),
        (24, 40, 3, MASKS_32),
        (24, 108, 3, (0xFF, 0xFF00, 0xFF0000)),
        (32, 40, 0, MASKS_32),
        (32, 108, 0, MASKS_32),
        (32, 40, 3, MASKS_32),
        (32, 40, 3, (0xFF000000, 0xFF0000, 0xFF00)),
        (32, 52, 3, (0xFF, 0xFF00, 0xFF0000)),
        (32, 40, 3, (0x3FF00000, 0xFFC00, 0x3FF)),
        (32, 40, 3, (0xFFE00000, 0x1FFC00, 0x3FF)),
        (32, 40, 3, (0x7FC0000, 0x3FE00, 0x1FF)),
        (32, 40, 3, (0xFF0000, 0, 0xFF)),
    ],
)
def test_masks(bits: int, header_bytes: int, compression: int, masks: tuple[int, ...]) -> None:
    rows = pack_values(masks, bits, PIXELS[..., 0])
    stored = masks if compression else ()
    options: dict[str, Any] = {"header_bytes": header_bytes, "compression": compression}
    data = build_bmp(rows, WIDTH, HEIGHT, bits, masks=stored, **options)
    expected = quantise(masks)
    expected[..., [mask == 0 for mask in masks[:3]]] = 0
    assert np.abs(decode_image(data) - expected).max() <= 0.5


@pytest.mark.parametrize(
    ("bits", "header_bytes", "compression", "masks"),
    [
        (32, 40, 6, ALPHA_32),
        (32, 56, 3, ALPHA_32),
        (32, 108, 3, ALPHA_32),
        (32, 124, 3, ALPHA_32),
        (32, 124, 0, ALPHA_32),
        (32, 108, 3, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
        (16, 56, 3, (0xF00, 0xF0, 0xF, 0xF000)),
        (16, 108, 3, (0x7C00, 0x3E0, 0x1F, 0x8000)),
    ],
)
def test_alpha_counts_unless_all_of_it_is_0(
    bits: int, header_bytes: int, compression: int, masks: tuple[int, ...]
) -> None:
    some = np.where(np.arange(WIDTH) > 3, 255, 0) * np.ones((HEIGHT, 1), np.int64)
    opaque = np.ones((HEIGHT, WIDTH))
    for alpha, shown in ((some, some / 255), (0 * some, opaque), (0 * some + 255, opaque)):
        rows = pack_values(masks, bits, alpha)
        options: dict[str, Any] = {"header_bytes": header_bytes, "compression": compression}
        data = build_bmp(rows, WIDTH, HEIGHT, bits, masks=masks, **options)
        expected = quantise(masks) * shown[..., None]
        assert np.abs(decode_image(data) - expected).max() <= 1


def test_one_visible_pixel_far_down_makes_the_others_transparent() -> None:
    rows = np.full((1000, 4 * 700), 200, np.uint8)
    rows[:, 3::4] = 0
    rows[0, 3] = 255
    data = build_bmp(rows, 700, 1000, 32, header_bytes=108, compression=3, masks=ALPHA_32)
    got = decode_image(data)
    assert got[0, 0].tolist() == [200, 200, 200]
    assert np.count_nonzero(got) == 3


def test_the_fourth_byte_without_a_mask_is_no_alpha() -> None:
    half = PIXELS[..., 0] * 0 + 128
    for header_bytes, compression in ((40, 0), (40, 3), (52, 3), (108, 0)):
        rows = pack_values(ALPHA_32, 32, half)
        masks = MASKS_32 if compression else ()
        options: dict[str, Any] = {"header_bytes": header_bytes, "compression": compression}
        data = build_bmp(rows, WIDTH, HEIGHT, 32, masks=masks, **options)
        np.testing.assert_array_equal(decode_image(data), PIXELS)


@pytest.mark.parametrize("bits", [16, 32])
def test_masks_of_0_mean_the_usual_ones(bits: int) -> None:
    usual = MASKS_32 if bits == 32 else (0x7C00, 0x3E0, 0x1F)
    rows = pack_values(usual, bits, PIXELS[..., 0])
    data = build_bmp(rows, WIDTH, HEIGHT, bits, compression=3, masks=(0, 0, 0))
    assert np.abs(decode_image(data) - quantise(usual)).max() <= 0.5


@pytest.mark.parametrize("is_top_down", [False, True])
@pytest.mark.parametrize("header_bytes", [40, 64, 108, 124])
@pytest.mark.parametrize(("bits", "compression"), [(8, 1), (4, 2)])
def test_run_lengths(bits: int, compression: int, header_bytes: int, is_top_down: bool) -> None:
    indices = RNG.integers(0, 2**bits, (HEIGHT, WIDTH))
    indices[:, 5:12] = 7
    indices[4] = 3
    palette = RNG.integers(0, 256, (2**bits, 3)).astype(np.uint8)
    coded = run_lengths(indices, bits)
    options: dict[str, Any] = {"header_bytes": header_bytes, "compression": compression}
    data = build_bmp(
        coded, WIDTH, HEIGHT, bits, palette=palette, is_top_down=is_top_down, **options
    )
    expected = palette[indices]
    np.testing.assert_array_equal(decode_image(data), expected[::-1] if is_top_down else expected)
    if not is_top_down:
        opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(opencv, expected)


def test_pixels_that_run_lengths_leave_out_have_the_first_colour() -> None:
    palette = np.array([[9, 8, 7], [1, 2, 3]], np.uint8)
    data = build_bmp(b"\2\1\0\1", 3, 2, 8, compression=1, palette=palette, colours=2)
    assert decode_image(data).tolist() == [[[9, 8, 7]] * 3, [[1, 2, 3], [1, 2, 3], [9, 8, 7]]]


def test_pixels_may_begin_late_and_lack_the_last_padding() -> None:
    late = insert(GOOD, 54, b"x" * 100)
    late = late[:10] + struct.pack("<I", 154) + late[14:]
    np.testing.assert_array_equal(decode_image(late), PIXELS)
    nowhere = GOOD[:10] + bytes(4) + GOOD[14:]
    np.testing.assert_array_equal(decode_image(nowhere), PIXELS)
    assert -BGR.shape[1] % 4 == 1
    np.testing.assert_array_equal(decode_image(GOOD[:-1]), PIXELS)


def changed(offset: int, layout: str, *values: int) -> bytes:
    return GOOD[:offset] + struct.pack(layout, *values) + GOOD[offset + struct.calcsize(layout) :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (GOOD[:2], "within its header, after 2 bytes"),
        (GOOD[:17], "within its header"),
        (GOOD[:25], "within its header"),
        (GOOD[:53], "within its header"),
        (GOOD[:54], "truncated: 0 bytes of pixels, 831 are needed"),
        (GOOD[:-2], "truncated: 830 bytes of pixels, 831 are needed"),
        (changed(10, "<I", 2**31), "truncated: 0 bytes"),
        (changed(10, "<I", 20), "begin at byte 20, within its header"),
        (changed(18, "<i", -5), "width of -5 px"),
        (changed(18, "<i", 0), "0x13 px"),
        (changed(22, "<i", 0), "21x0 px"),
        (changed(22, "<i", HEIGHT + 1), "truncated: 832 bytes of pixels, 895 are needed"),
        (build_bmp(b"\x30\1\0\1", 21, 1, 8, compression=1), "run lengths are damaged"),
        (build_bmp(b"\5\1", 21, 1, 8, compression=1), "run lengths are damaged"),
        (build_bmp(b"", 21, 1, 4, compression=2), "run lengths are damaged"),
        (build_bmp(b"\0\1", 2_000_000, 1, 8, compression=1), "damaged"),
        (build_bmp(BGR, 7, 7, 32, compression=3, masks=(0xF0F0, 0xFF, 0xFF)), "0xf0f0 has a gap"),
        (build_bmp(b"", 7, 7, 32, compression=3), "within its bit masks, after 54 bytes"),
    ],
)
def test_damage_is_refused_and_named(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptImage, match=reason):
        decode_image(data)


@pytest.mark.parametrize(
    ("bits", "compression", "header_bytes", "name"),
    [
        (24, 4, 40, "JPEG inside"),
        (24, 5, 40, "PNG inside"),
        (1, 3, 64, "Huffman 1D"),
        (24, 4, 64, "RLE24"),
        (8, 2, 40, "RLE4"),
        (4, 1, 40, "RLE8"),
        (8, 3, 40, "bit masks"),
        (3, 0, 40, "no compression"),
        (64, 0, 40, "no compression"),
        (8, 77, 40, "unknown"),
    ],
)
def test_kinds_that_are_not_read_are_named(
    bits: int, compression: int, header_bytes: int, name: str
) -> None:
    options: dict[str, Any] = {"compression": compression, "header_bytes": header_bytes}
    data = build_bmp(BGR, WIDTH, HEIGHT, bits, **options)
    with pytest.raises(UnsupportedFormat, match=rf"{bits} bits .* {compression} \({name}\)"):
        decode_image(data)


def test_other_files_that_start_with_bm_are_no_images() -> None:
    with pytest.raises(UnsupportedFormat, match=r"header of \d{5,} bytes"):
        decode_image(b"BM is what this text starts with, and it goes on")


def test_heights_that_have_no_opposite_are_too_large() -> None:
    with pytest.raises(ImageTooLarge, match="21x2147483648 px"):
        decode_image(changed(22, "<i", -(2**31)))
