"""PNG of every kind, with metadata, and damaged."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.decode import decode_image, open_image, read_image_hw
from pipeline.errors import CorruptImage
from pipeline.formats import png
from tests.support.image_files import (
    PNG_CHANNELS,
    PNG_HEADER_END,
    build_exif,
    build_png,
    encode,
    insert,
    png_chunk,
)

KINDS = [
    *((colour, depth) for colour in (0, 3) for depth in (1, 2, 4, 8)),
    *((colour, depth) for colour in (0, 2, 4, 6) for depth in (8, 16)),
]
HEIGHT, WIDTH = 17, 23
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3))
GOOD = build_png(PIXELS, 2, 8)


def put_in(*chunks: bytes) -> bytes:
    """The good PNG with chunks behind its header."""
    return insert(GOOD, PNG_HEADER_END, b"".join(chunks))


def with_header(**changes: int) -> bytes:
    values = {"width": WIDTH, "height": HEIGHT, "depth": 8, "colour": 2, "method": 0, "filter": 0}
    values |= {"interlace": 0} | changes
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *values.values()))
    return GOOD[:8] + header + GOOD[PNG_HEADER_END:]


@pytest.mark.parametrize("is_interlaced", [False, True], ids=["rows", "interlaced"])
@pytest.mark.parametrize(("colour", "depth"), dict.fromkeys(KINDS))
def test_every_kind_gives_what_opencv_gives(colour: int, depth: int, is_interlaced: bool) -> None:
    samples = RNG.integers(0, 2**depth, (HEIGHT, WIDTH, PNG_CHANNELS[colour]))
    samples[0, 0] = 2**depth - 1
    palette = RNG.integers(0, 256, (2**depth, 3)).astype(np.uint8).tobytes() if colour == 3 else b""
    before = png_chunk(b"PLTE", palette) if palette else b""
    data = build_png(samples, colour, depth, is_interlaced=is_interlaced, before=before)
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert decoded is not None
    expected = np.asarray(decoded, float)
    if depth == 16:
        expected = expected / 257 if colour == 0 else expected // 256
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    elif colour in (4, 6):
        expected = expected[..., 2::-1] * expected[..., 3:] / 255
    else:
        expected = expected[..., ::-1]
    assert np.abs(decode_image(data) - expected).max() <= 1


@pytest.mark.parametrize("is_interlaced", [False, True], ids=["rows", "interlaced"])
@pytest.mark.parametrize(("colour", "depth"), [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16)])
def test_a_transparent_grey_is_black(colour: int, depth: int, is_interlaced: bool) -> None:
    samples = RNG.integers(0, 2**depth, (HEIGHT, WIDTH, 1))
    samples[3:9, 4:11] = clear = 2**depth - 1
    before = png_chunk(b"tRNS", struct.pack(">H", clear))
    plain = decode_image(build_png(samples, colour, depth, is_interlaced=is_interlaced))
    data = build_png(samples, colour, depth, is_interlaced=is_interlaced, before=before)
    expected = np.where(samples == clear, 0, plain)
    np.testing.assert_array_equal(decode_image(data), expected)
    assert plain[3:9, 4:11].all()


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_is_black_and_its_neighbours_are_not(depth: int) -> None:
    samples = np.full((4, 6, 3), 200) << (depth - 8)
    samples[1, 2, 1] += 1
    before = png_chunk(b"tRNS", struct.pack(">3H", *(int(v) for v in samples[0, 0])))
    got = decode_image(build_png(samples, 2, depth, before=before))
    assert got.any(axis=2).sum() == 1
    assert got[1, 2].tolist() == [200, 200 + (depth == 8), 200]


def test_palettes_may_be_transparent() -> None:
    samples = np.array([[[0], [1], [2]]])
    before = png_chunk(b"PLTE", bytes([200, 100, 50] * 3)) + png_chunk(b"tRNS", b"\0\x80")
    assert decode_image(build_png(samples, 3, 8, before=before))[0].tolist() == [
        [0, 0, 0],
        [100, 50, 25],
        [200, 100, 50],
    ]


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000),
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
        png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
        png_chunk(b"eXIf", b"II*\0" + bytes(3_000_000)),
        png_chunk(b"tEXt", b"k\0v") * 30_000,
        png_chunk(b"tEXt", b"k\0v", is_damaged=True),
        png_chunk(b"gAMA", b"\0\0\0\1", is_damaged=True),
        png_chunk(b"pHYs", b"1"),
        png_chunk(b"tRNS", struct.pack(">3H", *(int(v) for v in PIXELS[0, 0])), is_damaged=True),
        png_chunk(b"tRNS", b"1"),
        png_chunk(b"eXIf", build_exif(6), is_damaged=True),
        png_chunk(b"PLTE", b"123"),
        png_chunk(b"acTL", b"damaged"),
        b"",
    ],
    ids=lambda chunk: repr(chunk[4:8]),
)
def test_metadata_changes_nothing_however_large_or_damaged(chunk: bytes) -> None:
    for data in (put_in(chunk), GOOD[:-12] + chunk + GOOD[-12:], GOOD[:-12] + chunk + b"junk"):
        np.testing.assert_array_equal(decode_image(data), PIXELS)


def test_a_bomb_in_the_metadata_is_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zlib, "decompressobj", None)
    monkeypatch.setattr(zlib, "decompress", None)
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10_000_000), 9))
    np.testing.assert_array_equal(decode_image(put_in(bomb)), PIXELS)


def test_the_first_exif_before_the_pixels_counts_as_in_browsers() -> None:
    turned = png_chunk(b"eXIf", build_exif(6))
    upright = png_chunk(b"eXIf", build_exif(1))
    assert open_image(put_in(turned, upright)).orientation == 6
    assert open_image(put_in(upright, turned)).orientation == 1
    assert open_image(GOOD[:-12] + turned + GOOD[-12:]).orientation == 1
    assert open_image(put_in(png_chunk(b"eXIf", b"Exif\0\0" + build_exif(6)))).orientation == 1


@pytest.mark.parametrize("kind", [b"iTXt", b"zTXt", b"tEXt"])
def test_orientations_outside_exif_do_not_count(kind: bytes) -> None:
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    raw = b"\nexif\n      38\n" + (b"Exif\0\0" + build_exif(6)).hex().encode()
    bodies = {
        b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + xmp,
        b"zTXt": b"Raw profile type exif\0\0" + zlib.compress(raw),
        b"tEXt": b"Raw profile type exif\0" + raw,
    }
    data = put_in(png_chunk(kind, bodies[kind]))
    assert decode_image(data).shape == (HEIGHT, WIDTH, 3)
    assert open_image(data).orientation == 1


def test_an_animation_gives_the_picture_without_animation() -> None:
    second = Image.new("RGB", (WIDTH, HEIGHT), "blue")
    picture = Image.fromarray(PIXELS.astype(np.uint8))
    for is_default in (False, True):
        options = {"save_all": True, "append_images": [second], "default_image": is_default}
        np.testing.assert_array_equal(decode_image(encode(picture, "PNG", **options)), PIXELS)


@pytest.mark.parametrize("chunk_bytes", [1, 100])
def test_pixels_may_be_in_many_chunks(chunk_bytes: int) -> None:
    empty = png_chunk(b"IDAT", b"")
    data = build_png(PIXELS, 2, 8, chunk_bytes=chunk_bytes, before=empty)
    np.testing.assert_array_equal(decode_image(data), PIXELS)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (GOOD[:8], "within its header, after 8 bytes"),
        (GOOD[:32], "within its header"),
        (GOOD[:33], "truncated: at byte 33 of 33"),
        (GOOD[:29] + b"abcd" + GOOD[33:], r"IHDR\) has a wrong checksum"),
        (GOOD[:-16] + b"abcd" + GOOD[-12:], "IDAT has a wrong checksum"),
        (GOOD[:-13], "truncated: at byte 33 .* IDAT"),
        (GOOD[: len(GOOD) // 2], "truncated: at byte 33 .* IDAT"),
        (put_in(png_chunk(b"tEXt", bytes(99)))[:80], "truncated: at byte 33 of 80 .* tEXt of 99"),
        (put_in(struct.pack(">I", 2**31 - 1) + b"tEXt"), "tEXt of 2147483647 bytes"),
        (put_in(struct.pack(">I", 2**32 - 1) + b"IDAT"), "IDAT of 4294967295 bytes"),
        (put_in(b"\0\0\0\0\x00\x01\x02\x03" + bytes(9)), "a chunk 00 01 02 03 of 0 bytes"),
        (put_in(png_chunk(b"ABCD", b"x")), "a chunk ABCD before any pixels"),
        (put_in(GOOD[8:33]), "a chunk IHDR before any pixels"),
        (put_in(png_chunk(b"IEND", b"")), "a chunk IEND before any pixels"),
        (put_in(png_chunk(b"PLTE", b"123", is_damaged=True)), "PLTE has a wrong checksum"),
        (insert(GOOD, 8, png_chunk(b"CgBI", b"1234")), "starts with a chunk CgBI of 4 bytes"),
        (insert(GOOD, 8, b"\0\0\0\1IHDR"), "a chunk IHDR of 1 bytes"),
        (with_header(depth=3), "colour type 2 with 3 bits"),
        (with_header(colour=1), "colour type 1 with 8 bits"),
        (with_header(colour=3), "no palette"),
        (with_header(interlace=2), r"\[0, 0, 2\]"),
        (with_header(method=1), r"\[1, 0, 0\]"),
        (with_header(filter=1), r"\[0, 1, 0\]"),
        (with_header(width=0), "0x17 px"),
        (with_header(height=0), "23x0 px"),
        (with_header(height=HEIGHT + 1), "1190 bytes of pixels, 1260 are needed"),
        (with_header(interlace=1, height=HEIGHT + 9), "are needed|damaged or truncated"),
        (put_in(png_chunk(b"IDAT", b"")).replace(b"\x78\x9c", b"\x78\x9d"), "wrong checksum"),
    ],
)
def test_damage_is_refused_and_named(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptImage, match=reason):
        decode_image(data)


@pytest.mark.parametrize("is_interlaced", [False, True], ids=["rows", "interlaced"])
def test_one_missing_byte_is_noticed_in_images_of_zeros(is_interlaced: bool) -> None:
    """Rows that are missing are left 0."""
    before = png_chunk(b"PLTE", b"white!")
    for height, width in ((1, 1), (1, 9), (9, 1), (5, 5), (8, 8), (13, 11), (3, 40), (40, 3)):
        for colour, depth in ((0, 1), (0, 16), (2, 8), (3, 8), (4, 8), (6, 16)):
            samples = np.zeros((height, width, PNG_CHANNELS[colour]), np.int64)
            options: dict[str, Any] = {"is_interlaced": is_interlaced}
            options["before"] = before if colour == 3 else b""
            whole = build_png(samples, colour, depth, **options)
            assert decode_image(whole).shape == (height, width, 3)
            cut = build_png(samples, colour, depth, missing_bytes=1, **options)
            with pytest.raises(CorruptImage, match=r"bytes of pixels|file is truncated"):
                decode_image(cut)


@pytest.mark.parametrize("is_interlaced", [False, True], ids=["rows", "interlaced"])
def test_missing_rows_are_noticed_behind_several_chunks(is_interlaced: bool) -> None:
    samples = np.zeros((64, 64, 3), np.int64)
    data = build_png(samples, 2, 8, is_interlaced=is_interlaced, chunk_bytes=5)
    header = struct.pack(">IIBBBBB", 64, 65, 8, 2, 0, 0, int(is_interlaced))
    assert decode_image(data).shape == (64, 64, 3)
    with pytest.raises(CorruptImage, match=r"bytes of pixels|file is truncated"):
        decode_image(data[:8] + png_chunk(b"IHDR", header) + data[PNG_HEADER_END:])


@pytest.mark.parametrize("kind", [b"tEXt", b"IDAT", b"eXIf", b"PLTE"])
def test_chunks_are_bounded_in_number(kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "MAX_CHUNKS", 100)
    assert decode_image(put_in(png_chunk(kind, b"") * 98)).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(CorruptImage, match="more than 100 chunks"):
        decode_image(put_in(png_chunk(kind, b"") * 100))


def test_sizes_are_read_from_the_header_alone() -> None:
    assert read_image_hw(GOOD[:33]) == (HEIGHT, WIDTH)
