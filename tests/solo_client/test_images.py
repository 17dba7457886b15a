from __future__ import annotations

import io
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

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
    assert read_input(os.scandir(tmp_path).__next__()) == ("a.jpg", b"any bytes")
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


@pytest.mark.parametrize(
    "data",
    [
        b"any bytes",
        bytearray(b"any bytes"),
        memoryview(b"any bytes"),
        memoryview(b"_any bytes")[1:],
    ],
)
def test_bytes_of_any_kind_are_sent(data: bytes | bytearray | memoryview) -> None:
    name, sent = read_input(data)
    assert (name, sent) == (None, b"any bytes")
    assert type(sent) is bytes


@pytest.mark.parametrize(
    ("address", "buffering", "name"),
    [
        (str, -1, "a.jpg"),
        (str, 0, "a.jpg"),
        (os.fsencode, -1, "a.jpg"),
        (lambda path: os.open(path, os.O_RDONLY), -1, None),
    ],
    ids=["path", "unbuffered", "path of bytes", "descriptor"],
)
def test_open_files_are_read_from_their_start(
    tmp_path: Path, address: Callable[[Path], Any], buffering: int, name: str | None
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"any bytes")
    with open(address(tmp_path / "a.jpg"), "rb", buffering) as file:
        assert read_input(file) == (name, b"any bytes")
        assert read_input(file) == (name, b"any bytes"), "it was at its end"


@pytest.mark.parametrize(
    "kind", [io.BytesIO, tempfile.SpooledTemporaryFile, tempfile.TemporaryFile]
)
def test_files_in_memory_are_read_from_their_start(kind: Callable[[], IO[bytes]]) -> None:
    with kind() as file:
        file.write(b"any bytes")
        assert read_input(file) == (None, b"any bytes")


def test_a_mapped_file_is_read_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"any bytes")
    with (
        open(tmp_path / "a.jpg", "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        mapped.seek(4)
        assert read_input(mapped) == (None, b"any bytes")  # type: ignore[arg-type]


def test_a_pipe_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as file:
        with open(writer, "wb") as end:
            end.write(b"any bytes")
        assert read_input(file) == (None, b"any bytes")


def test_files_that_are_open_as_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    with (
        open(tmp_path / "a.jpg", encoding="utf-8") as text,
        tempfile.NamedTemporaryFile("w+", prefix="a.jpg") as temporary,
    ):
        for file in (text, temporary):
            with pytest.raises(TypeError, match=r"'a\.jpg.*' is open as text; .* \('rb'\)"):
                read_input(file)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="StringIO is open as text"):
        read_input(io.StringIO("words"))  # type: ignore[arg-type]


def test_a_reader_of_anything_else_is_refused() -> None:
    class Reader:
        name = "/folder/a.jpg"

        def read(self) -> list[int]:
            return [255, 216]

    with pytest.raises(TypeError, match=r"Reader 'a\.jpg' gives list, not bytes"):
        read_input(Reader())  # type: ignore[arg-type]


def test_a_closed_file_is_refused() -> None:
    file = io.BytesIO(b"file")
    file.close()
    with pytest.raises(ValueError, match="closed file"):
        read_input(file)


def test_a_pil_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="no pixels: 0 x 5"):
        read_input(Image.new("RGB", (0, 5)))


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=tmp_path.name):
        read_input(tmp_path)


@pytest.mark.parametrize("wrong", [[1, 2], None, 7])
def test_other_things_are_no_images(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"not {type(wrong).__name__}"):
        read_input(wrong)
