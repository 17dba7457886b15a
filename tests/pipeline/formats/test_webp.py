"""WebP of every kind, with metadata, animated, and damaged."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.decode import decode_image, open_image, read_image_hw
from pipeline.errors import CorruptImage
from pipeline.formats import webp
from tests.support.image_files import (
    build_exif,
    build_webp,
    encode,
    riff_chunk,
    webp_canvas,
    webp_frame,
)

HEIGHT, WIDTH = 41, 63
RNG = np.random.default_rng(0)
RGBA = np.kron(RNG.integers(0, 256, (HEIGHT, 7, 4)), np.ones((1, 9, 1))).astype(np.uint8)
RGB = np.ascontiguousarray(RGBA[..., :3])
LOSSY = encode(RGB, "WEBP", quality=90)
LOSSLESS = encode(RGB, "WEBP", lossless=True)
CLEAR = encode(RGBA, "WEBP", lossless=True, exact=True)
LOSSY_CHUNK, CLEAR_CHUNK = LOSSY[12:], CLEAR[12:]
ANIMATION, EXIF, ALPHA = 2, 8, 16
EXIF_6 = riff_chunk(b"EXIF", build_exif(6))


def draw_on_black(rgba: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[Any]]:
    return rgba[..., :3].astype(float) * (rgba[..., 3:] / 255)


@pytest.mark.parametrize("options", [{"quality": 80}, {"lossless": True}, {"quality": 5}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_pixels_equal_pillows(mode: str, options: dict[str, Any]) -> None:
    data = encode(Image.fromarray(RGBA).convert(mode), "WEBP", **options)
    expected = draw_on_black(np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")))
    assert np.abs(decode_image(data) - expected).max() <= 1


def test_transparency_is_drawn_on_black() -> None:
    assert np.abs(decode_image(CLEAR) - draw_on_black(RGBA)).max() <= 1


@pytest.mark.parametrize("alpha_quality", [100, 20])
def test_a_lossy_picture_may_be_transparent(alpha_quality: int) -> None:
    data = encode(RGBA, "WEBP", quality=95, alpha_quality=alpha_quality)
    assert b"ALPH" in data
    expected = draw_on_black(np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")))
    assert np.abs(decode_image(data) - expected).max() <= 1
    opaque = data[:20] + bytes([data[20] & ~ALPHA]) + data[21:]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(decode_image(opaque).astype(int) - expected).mean() < 1


def test_metadata_is_skipped() -> None:
    data = build_webp(
        webp_canvas(WIDTH, HEIGHT, EXIF),
        riff_chunk(b"ICCP", bytes(1_000_001)),
        riff_chunk(b"ABCD", b"odd"),
        LOSSY_CHUNK,
        riff_chunk(b"XMP ", b'<x tiff:Orientation="6"/>' * 100_000),
    )
    np.testing.assert_array_equal(decode_image(data), decode_image(LOSSY))
    np.testing.assert_array_equal(decode_image(LOSSY + b"junk"), decode_image(LOSSY))


@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
@pytest.mark.parametrize("before", [False, True])
def test_exif_turns(prefix: bytes, before: bool) -> None:
    exif = riff_chunk(b"EXIF", prefix + build_exif(6))
    chunks = [exif, LOSSY_CHUNK] if before else [LOSSY_CHUNK, exif]
    data = build_webp(webp_canvas(WIDTH, HEIGHT, EXIF), *chunks)
    assert read_image_hw(data) == (HEIGHT, WIDTH)
    assert open_image(data).upright_hw == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(decode_image(data), np.rot90(decode_image(LOSSY), -1))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_of_an_animation_the_first_frame_is_shown(mode: str) -> None:
    first = Image.fromarray(RGBA).convert(mode)
    options: dict[str, Any] = {"save_all": True, "append_images": [first.rotate(180)]}
    data = encode(first, "WEBP", lossless=True, exact=True, **options)
    assert b"ANMF" in data
    expected = draw_on_black(RGBA) if mode == "RGBA" else RGB
    assert np.abs(decode_image(data) - expected).max() <= 1


def test_a_frame_smaller_than_the_canvas_is_on_black() -> None:
    animation = riff_chunk(b"ANIM", b"\xff\0\0\xff\0\0")
    frame = webp_frame(10, 20, WIDTH, HEIGHT, CLEAR_CHUNK)
    later = webp_frame(0, 0, WIDTH, HEIGHT, LOSSY_CHUNK)
    data = build_webp(webp_canvas(100, 90, ANIMATION | ALPHA), animation, frame, later, EXIF_6)
    expected = np.zeros((90, 100, 3))
    expected[20 : 20 + HEIGHT, 10 : 10 + WIDTH] = draw_on_black(RGBA)
    assert open_image(data).orientation == 6
    assert np.abs(decode_image(data) - np.rot90(expected, -1)).max() <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (LOSSY[:12], "within its header, after 12 bytes"),
        (LOSSY[:18], "within its header"),
        (LOSSY[:24], "does not start a picture"),
        (build_webp(), "within its header"),
        (build_webp(riff_chunk(b"VP8X", bytes(9))), "VP8X has 9 bytes"),
        (build_webp(riff_chunk(b"ABCD", bytes(99)), LOSSY_CHUNK), "b'ABCD' of 44 bytes does not"),
        (LOSSY[:60], "truncated: 60 bytes of"),
        (LOSSLESS[:-5], "truncated"),
        (build_webp(LOSSY_CHUNK[: len(LOSSY_CHUNK) // 2]), "no picture"),
        (build_webp(webp_canvas(WIDTH, HEIGHT, 0), EXIF_6), "no picture"),
        (build_webp(webp_canvas(WIDTH + 1, HEIGHT, 0), LOSSY_CHUNK), r"63x41 px .* \(41, 64\)"),
        (build_webp(webp_canvas(WIDTH, 40, 0), LOSSY_CHUNK), r"63x41 px .* \(40, 63\)"),
        (
            build_webp(webp_canvas(70, 50, 2), webp_frame(8, 0, WIDTH, HEIGHT, LOSSY_CHUNK)),
            r"not that of its canvas .* \(50, 70\)",
        ),
        (
            build_webp(webp_canvas(70, 50, 2), webp_frame(0, 10, WIDTH, HEIGHT, LOSSY_CHUNK)),
            r"not that of its canvas .* \(50, 70\)",
        ),
        (build_webp(webp_canvas(70, 50, 2), webp_frame(0, 0, 9, 9, b"")), "no picture"),
        (build_webp(webp_canvas(70, 50, 2), riff_chunk(b"ANMF", b"short")), "no picture"),
        (build_webp(riff_chunk(b"VP8 ", LOSSY_CHUNK[8:200])), "damaged or truncated"),
        (build_webp(riff_chunk(b"VP8L", b"\x2f" + bytes(99))), "damaged or truncated"),
        (build_webp(riff_chunk(b"VP8 ", LOSSY_CHUNK[8:14] + bytes(40))), "0x0 px"),
        (
            build_webp(
                webp_canvas(WIDTH, HEIGHT, ALPHA), riff_chunk(b"ALPH", b"\1bad"), LOSSY_CHUNK
            ),
            "damaged or truncated",
        ),
    ],
)
def test_damage_is_refused_and_named(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptImage, match=reason):
        decode_image(data)


def test_chunks_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webp, "MAX_CHUNKS", 100)
    canvas, empty = webp_canvas(WIDTH, HEIGHT, 0), riff_chunk(b"ABCD", b"")
    assert decode_image(build_webp(canvas, LOSSY_CHUNK, empty * 97)).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(CorruptImage, match="more than 100 chunks"):
        decode_image(build_webp(canvas, LOSSY_CHUNK, empty * 98))
