"""Stage `decode`: what a request's image becomes before the engine."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ImageTooLarge, UnsupportedFormat
from pipeline.model_config import ModelConfig, parse_model_config
from service.work.steps import Options, count_pixels, decode
from tests.support.blob_model import (
    KEEP_RATIO_INPUT,
    build_graph,
    draw_picture,
    encode_picture,
    model_config,
)

MAX_PIXELS = 10_000_000


def build_photo() -> bytes:
    y, x = np.mgrid[:900, :1200] / 90
    pixels = np.uint8(127 + 120 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=2))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@pytest.fixture
def config() -> ModelConfig:
    content = {**model_config(build_graph()), "input": KEEP_RATIO_INPUT}
    return parse_model_config(json.dumps(content)).for_version(1)


def test_scaled_decoding_gives_nearly_the_same_canvas(config: ModelConfig) -> None:
    data = build_photo()
    exact = decode(data, config, MAX_PIXELS, Options()).prepared
    scaled = decode(data, config, MAX_PIXELS, Options(), scaled=True).prepared
    assert scaled.image_hw == exact.image_hw == (900, 1200)
    (a,), (b,) = exact.tiles, scaled.tiles
    assert (a.window, a.valid_hw, a.image.shape) == (b.window, b.valid_hw, b.image.shape)
    difference = np.abs(a.image.astype(int) - b.image)
    assert difference.max() > 0 and difference.mean() < 2


def test_a_picture_to_draw_on_is_decoded_as_it_is(config: ModelConfig) -> None:
    decoded = decode(build_photo(), config, MAX_PIXELS, Options(overlay=True), scaled=True)
    assert decoded.picture is not None and decoded.picture.shape == (900, 1200, 3)


def test_pixels_are_counted_without_decoding() -> None:
    picture = draw_picture(30, 40)
    counts = count_pixels([encode_picture(picture), picture, b"no image", picture], 1200)
    assert counts[:2] == [1200, 1200]
    assert isinstance(counts[2], UnsupportedFormat)
    (refused,) = count_pixels([picture], 1199)
    assert isinstance(refused, ImageTooLarge)
    assert "40x30" in str(refused)


@pytest.mark.parametrize("overlay", [False, True])
def test_pixels_and_their_file_become_the_same_canvases(config: ModelConfig, overlay: bool) -> None:
    picture = draw_picture(70, 100)
    options = Options(overlay=overlay)
    pixels = np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.shape)  # read-only
    one = decode(encode_picture(picture), config, 10_000, options)
    other = decode(pixels, config, 10_000, options)
    assert one.prepared.image_hw == other.prepared.image_hw == (70, 100)
    for a, b in zip(one.prepared.tiles, other.prepared.tiles, strict=True):
        assert (a.image == b.image).all()
        assert a.window == b.window
    drawn = [image.picture for image in (one, other) if image.picture is not None]
    assert len(drawn) == (2 if overlay else 0)
    assert all((p == picture).all() for p in drawn)
