from __future__ import annotations

import numpy as np
import pytest

from pipeline.decode import decode_image
from pipeline.errors import UnsupportedFormat
from pipeline.formats.names import name_format
from tests.support.image_files import encode

PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encode(PICTURE, "GIF"), "GIF"),
        (encode(PICTURE, "PPM"), "PNM"),
        (encode(PICTURE, "ICO"), "Windows icon"),
        (encode(PICTURE, "PDF"), "PDF"),
        (encode(PICTURE, "DDS"), "DDS"),
        (b"\0\0\0\x20ftypavif", "AVIF"),
        (b"\0\0\0\x20ftypheic", "HEIC"),
        (b"\0\0\0\x20ftypmif1", "HEIF or AVIF"),
        (b"\0\0\0\x20ftypisom", "MP4"),
        (b"\xff\x0a\0", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\n<!DOCTYPE html>", "HTML"),
        (b"\xef\xbb\xbf<html>", "HTML"),
        (b'<?xml version="1.0"?><svg/>', "SVG or XML"),
        (b"  <svg xmlns='x'>", "SVG or XML"),
    ],
)
def test_files_that_are_not_read_are_named(data: bytes, name: str) -> None:
    assert name_format(data) == name
    with pytest.raises(UnsupportedFormat, match=f"^{name} files .*JPEG, PNG, WEBP, BMP"):
        decode_image(data)


@pytest.mark.parametrize("data", [b"words", bytes(500), b"RIFF\0\0\0\0WAVEfmt "])
def test_other_files_have_no_name(data: bytes) -> None:
    assert name_format(data) is None
    with pytest.raises(UnsupportedFormat, match=data[:4].hex(" ")):
        decode_image(data)
