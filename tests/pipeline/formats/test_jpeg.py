"""JPEG of every coding and sampling, with metadata, and damaged."""

from __future__ import annotations

import re
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.decode import decode_image, open_image, read_image_hw
from pipeline.errors import CorruptImage, UnsupportedFormat
from pipeline.formats import jpeg
from tests.support.image_files import (
    ARITHMETIC_JPEG,
    JPEG_410,
    build_exif,
    encode,
    insert,
    jpeg_segment,
)
from tests.support.pictures import build_jpeg_of_scans

HEIGHT, WIDTH = 61, 83


def draw_waves(height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width] / 9
    waves = [np.sin(x + y), np.cos(x - y), np.sin(x) * np.cos(y)]
    return np.asarray(127 + 120 * np.stack(waves, axis=2)).astype(np.uint8)


PICTURE = draw_waves()
GOOD = encode(PICTURE, "JPEG", quality=92)
PROGRESSIVE = encode(PICTURE, "JPEG", progressive=True)
SCAN = GOOD.index(b"\xff\xda")
FRAME = GOOD.index(b"\xff\xc0")
EXIF_6 = jpeg_segment(0xE1, b"Exif\0\0" + build_exif(6))


def decode_with_opencv(data: bytes) -> NDArray[np.uint8]:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    assert decoded is not None
    return np.asarray(decoded, np.uint8)


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411", "Gray"])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (16, 16), (1, 1), (7, 130)])
def test_every_sampling_gives_what_opencv_gives(sampling: str, size: tuple[int, int]) -> None:
    picture = draw_waves(*size)
    if sampling == "Gray":
        picture = np.ascontiguousarray(picture[..., :1])
    kind = "Gray" if sampling == "Gray" else "RGB"
    data = simplejpeg.encode_jpeg(picture, 92, kind, sampling)
    got = decode_image(data)
    assert got.shape == (*size, 3)
    assert np.abs(got.astype(int) - decode_with_opencv(data)).max() <= 2
    assert np.abs(got.astype(int) - picture).mean() < 12


def test_four_by_two_pixels_may_share_a_colour() -> None:
    got = decode_image(JPEG_410)
    assert got.shape == (16, 32, 3)
    assert np.abs(got.astype(int) - (200, 60, 60)).max() <= 4


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"restart_marker_blocks": 1},
        {"restart_marker_rows": 1, "progressive": True},
        {"keep_rgb": True},
        {"optimize": True, "quality": 100, "subsampling": 0},
        {"quality": 1},
        {"icc_profile": bytes(200_000)},
        {"comment": b"c" * 60_000, "dpi": (300, 300)},
    ],
    ids=str,
)
def test_every_option_gives_what_opencv_gives(options: dict[str, Any]) -> None:
    data = encode(PICTURE, "JPEG", **options)
    assert np.abs(decode_image(data).astype(int) - decode_with_opencv(data)).max() <= 2


def test_arithmetic_coding_is_decoded() -> None:
    image = open_image(ARITHMETIC_JPEG)
    assert isinstance(image, jpeg.Jpeg) and "arithmetic" in image.coding
    assert image.decode()[:, [0, 7, 8, 15], 0].tolist() == [[50, 50, 200, 200]] * 8


def test_inverted_cmyk_has_its_colours() -> None:
    inks = Image.fromarray(PICTURE).convert("CMYK")
    got = decode_image(encode(inks, "JPEG", quality=95, subsampling=0))
    assert np.abs(got.astype(int) - PICTURE).mean() < 3
    assert decode_image(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).min() == 255


@pytest.mark.parametrize(
    ("marker", "name"),
    [(0xC3, "lossless"), (0xC5, "hierarchical"), (0xCB, "lossless with arithmetic coding")],
)
def test_codings_that_are_not_decoded_are_named(marker: int, name: str) -> None:
    data = GOOD[: FRAME + 1] + bytes([marker]) + GOOD[FRAME + 2 :]
    with pytest.raises(UnsupportedFormat, match=f"is {name} with 3 components of 8 bits"):
        decode_image(data)


@pytest.mark.parametrize(("bits", "components"), [(12, 3), (16, 3), (8, 2), (8, 5)])
def test_other_depths_and_colours_are_named(bits: int, components: int) -> None:
    data = bytearray(GOOD)
    data[FRAME + 4], data[FRAME + 9] = bits, components
    message = f"is baseline with {components} components of {bits} bits, which cannot be decoded"
    with pytest.raises(UnsupportedFormat, match=message):
        decode_image(bytes(data))


def test_of_several_pictures_the_first_is_taken() -> None:
    second = Image.fromarray(PICTURE).rotate(90)
    data = encode(PICTURE, "MPO", save_all=True, append_images=[second], quality=92)
    np.testing.assert_array_equal(decode_image(data), decode_image(GOOD))


@pytest.mark.parametrize("position", [2, SCAN], ids=["at the start", "before the scan"])
def test_exif_is_found_wherever_it_is_before_the_scan(position: int) -> None:
    data = insert(GOOD, position, EXIF_6)
    assert decode_image(data).shape == (WIDTH, HEIGHT, 3)
    assert read_image_hw(data) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "segments",
    [
        jpeg_segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'),
        jpeg_segment(0xE1, b"Exif\0\0" + build_exif(1)) + EXIF_6,
        jpeg_segment(0xE1, b"Exif\0\0damaged") + EXIF_6,
        jpeg_segment(0xE2, b"Exif\0\0" + build_exif(6)),
        jpeg_segment(0xE1, b"Exif"),
        jpeg_segment(0xFE, EXIF_6),
    ],
    ids=["XMP", "upright first", "damaged first", "other segment", "empty", "in a comment"],
)
def test_only_the_first_exif_turns_as_in_browsers(segments: bytes) -> None:
    np.testing.assert_array_equal(decode_image(insert(GOOD, 2, segments)), decode_image(GOOD))


def test_a_segment_after_the_first_exif_does_not_count() -> None:
    second = jpeg_segment(0xE1, b"Exif\0\0" + build_exif(3))
    assert open_image(insert(GOOD, 2, EXIF_6 + second)).orientation == 6
    padded = jpeg_segment(0xE1, b"Exif\0\xff" + build_exif(6))
    assert open_image(insert(GOOD, 2, padded)).orientation == 6


@pytest.mark.parametrize(
    "extra",
    [b"\xff" * 1000, b"\0\0\0", b"\xff\x01", jpeg_segment(0xE7, bytes(65_533)) * 30],
    ids=["fill bytes", "junk", "TEM", "2 MB of segments"],
)
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_padding_and_metadata_are_skipped(extra: bytes, mode: str) -> None:
    data = encode(Image.fromarray(PICTURE).convert(mode), "JPEG", quality=92)
    position = data.index(b"\xff\xdb")
    np.testing.assert_array_equal(decode_image(insert(data, position, extra)), decode_image(data))


def test_a_warning_of_the_decoder_is_no_damage() -> None:
    """Extraneous bytes between segments of the scan."""
    data = insert(GOOD, len(GOOD) - 2, b"\0" * 10)
    np.testing.assert_array_equal(decode_image(data), decode_image(GOOD))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (GOOD[:3], "no frame header"),
        (GOOD[: FRAME + 6], "no frame header"),
        (GOOD[:SCAN], "ends before its first scan"),
        (GOOD[: SCAN + 5], "ends before its first scan"),
        (GOOD[: len(GOOD) // 2], "truncated"),
        (GOOD[:-30], "truncated"),
        (PROGRESSIVE[: len(PROGRESSIVE) // 2], "truncated"),
        (GOOD[:FRAME] + GOOD[SCAN:], "no frame header before its first scan"),
        (GOOD[:2] + b"\xff\xe0\0\1" + GOOD[2:], "no frame header"),
        (GOOD[:2] + b"\xff\xe0\xff\xff" + GOOD[2:], "no frame header"),
        (GOOD[: FRAME + 5] + b"\0\0" + GOOD[FRAME + 7 :], "83x0 px"),
        (GOOD[: FRAME + 7] + b"\0\0" + GOOD[FRAME + 9 :], "0x61 px"),
        (GOOD[:FRAME] + jpeg_segment(0xC0, b"12345") + GOOD[SCAN:], "has 7 bytes"),
        (GOOD[:2] + b"\xff\xd9", "no frame header"),
    ],
)
def test_damage_is_refused_and_named(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptImage, match=reason) as caught:
        decode_image(data)
    assert not re.search("0x[0-9a-f]{6}", str(caught.value)), "no addresses in messages"


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_higher_picture_than_there_is_data_is_refused(mode: str) -> None:
    data = bytearray(encode(Image.fromarray(PICTURE).convert(mode), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 7] = (HEIGHT + 400).to_bytes(2, "big")
    with pytest.raises(CorruptImage, match="truncated"):
        decode_image(bytes(data))


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    """30 KB that took a decoder many seconds."""
    with pytest.raises(CorruptImage, match="more than 50 scans"):
        decode_image(build_jpeg_of_scans(64, 1000))
    assert decode_image(build_jpeg_of_scans(64, 20)).shape == (64, 64, 3)


def test_scans_are_counted_behind_segments_that_look_like_an_end() -> None:
    data = build_jpeg_of_scans(64, 1000)
    comment = b"\xff\xfe\x00\x06\xff\xd9\xff\xd9"
    with pytest.raises(CorruptImage, match="more than 50 scans"):
        decode_image(insert(data, data.rindex(b"\xff\xc2"), comment))


def test_what_follows_a_jpeg_is_not_counted() -> None:
    """A telephone's moving picture is a film behind a JPEG."""
    assert decode_image(GOOD + b"\xff\xda\x00\x02" * 100).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_segments_are_found_in_short_searches(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search lets no other thread run, whatever a file has between its segments."""
    filled = insert(insert(GOOD, 2, b"\xff" * 50), SCAN + 50 + 20, b"\xff\x00" * 9 + b"\xff\xd0")
    expected = list(jpeg._segments(filled, 100))
    assert len(expected) > 5
    searched: list[int] = []

    class Marker:
        pattern = jpeg._MARKER

        def search(self, data: bytes, start: int, end: int) -> re.Match[bytes] | None:
            searched.append(end - start)
            return self.pattern.search(data, start, end)

    monkeypatch.setattr(jpeg, "_MARKER", Marker())
    monkeypatch.setattr(jpeg, "_WINDOW_BYTES", window)
    assert list(jpeg._segments(filled, 100)) == expected
    assert max(searched) == window + 1


@pytest.mark.parametrize("segment", [b"\xff\xfe\x00\x02", b"\xff\xd8", b"\xff\x01"])
def test_segments_are_bounded_in_number(segment: bytes) -> None:
    for read in (read_image_hw, open_image, decode_image):
        with pytest.raises(CorruptImage, match="more than 10000 segments"):
            read(insert(GOOD, 2, segment * 20_000))
    with pytest.raises(CorruptImage, match="more than 10000 segments"):
        decode_image(insert(GOOD, len(GOOD) - 2, segment * 20_000))
    assert decode_image(insert(GOOD, 2, b"\xff\xfe\x00\x02" * 9_900)).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 5}])
def test_jpegs_give_the_pixels_that_pillow_gives(
    mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(Image.fromarray(PICTURE).convert(mode), "JPEG", **options)
    image = open_image(data)
    assert isinstance(image, jpeg.Jpeg)
    fast = image._decode_fast((0, 0))
    assert fast is not None
    monkeypatch.setattr(jpeg.Jpeg, "_decode_fast", lambda self, least_hw: None)
    np.testing.assert_array_equal(fast, image.decode())
