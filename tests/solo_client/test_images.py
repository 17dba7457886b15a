from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.decode import decode_image
from solo_client.images import read_input

PIXELS = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


def test_files_are_sent_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"any bytes")
    assert read_input(file) == ("a.jpg", b"any bytes")
    assert read_input(str(file)) == ("a.jpg", b"any bytes")
    assert read_input(b"any bytes") == (None, b"any bytes")
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        read_input(tmp_path / "missing.png")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS, PIXELS),
        (PIXELS[::-1, ::2], PIXELS[::-1, ::2]),
        (PIXELS[..., 0], PIXELS[..., [0, 0, 0]]),
        (np.dstack([PIXELS, np.full((4, 5), 255, np.uint8)]), PIXELS),
    ],
)
def test_arrays_arrive_pixel_by_pixel(array: NDArray[Any], expected: NDArray[Any]) -> None:
    name, data = read_input(array)
    assert name is None
    assert (decode_image(data) == expected).all()


def test_sixteen_bits_arrive() -> None:
    array = np.array([[0, 4095], [2048, 7]], np.uint16)
    _, data = read_input(array)
    assert (np.asarray(Image.open(io.BytesIO(data))) == array).all()


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.astype(float),
        PIXELS.astype(np.uint16),
        PIXELS[..., :2],
        PIXELS[None],
        PIXELS[:0],
        np.uint8(3) * np.ones(5, np.uint8),
    ],
)
def test_other_arrays_are_refused_with_type_and_shape(array: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=rf"the array is {array.dtype} \[.*{array.shape[-1]}\]"):
        read_input(array)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F"])
def test_pil_images_of_any_mode_arrive(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    _, data = read_input(image)
    expected = np.asarray(image.convert("RGB"))
    assert (decode_image(data) == expected).all()


def test_what_a_pil_image_shows_is_sent() -> None:
    """Not what its EXIF orientation says: its pixels are already an array for the user."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(buffer, "PNG", exif=exif)
    image = Image.open(buffer)
    assert image.getexif()[0x0112] == 6
    assert (decode_image(read_input(image)[1]) == PIXELS).all()


def test_other_things_are_no_images() -> None:
    with pytest.raises(TypeError, match="not list"):
        read_input([1, 2])  # type: ignore[arg-type]
