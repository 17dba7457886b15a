from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from solo_client.images import ImageInput
from solo_client.request import build_request


def read_body(images: list[ImageInput]) -> bytes:
    _, request = build_request(images, {})
    request["url"] = "http://test" + request["url"]
    return httpx.Request(**request).read()


def test_one_image_is_the_body_and_several_are_parts() -> None:
    names, request = build_request([b"one"], {})
    assert names == [None]
    assert request["content"] == b"one"
    assert read_body([b"one"]) == b"one"
    body = read_body([b"one", b"two"])
    assert body.count(b'name="images"') == 2
    assert b"one" in body
    assert b"two" in body
    assert build_request([], {})[0] == []


def test_given_options_are_parameters() -> None:
    _, request = build_request(
        [b"one"],
        {
            "overlaps": "resolve",
            "object_size_px": 12.5,
            "um_per_px": None,
            "masks": True,
            "version": 2,
        },
    )
    assert request["params"] == {"overlaps": "resolve", "object_size_px": "12.5", "version": "2"}


def test_images_come_from_any_iterable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"file")

    def give() -> Iterator[ImageInput]:
        yield tmp_path / "a.png"
        yield b"bytes"

    assert build_request(give(), {})[0] == ["a.png", None]
    assert build_request((b"bytes",), {})[0] == [None]
    assert build_request(np.zeros((3, 4, 5), np.uint8), {})[0] == [None] * 3


@pytest.mark.parametrize("wrong", ["a.png", Path("a.png"), b"file", bytearray(b"file")])
def test_one_image_is_not_taken_for_several(wrong: ImageInput) -> None:
    with pytest.raises(
        TypeError, match=r"several images are a list or another iterable, not .*file|a\.png"
    ):
        build_request(wrong, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ('a "b" c.png', b'filename="a %22b%22 c.png"'),
        ("größe.png", 'filename="größe.png"'.encode()),
        (os.fsdecode(b"a\xff.png"), 'filename="a\N{REPLACEMENT CHARACTER}.png"'.encode()),
        ("a\r\nb.png", b'filename="a%0D%0Ab.png"'),
    ],
)
def test_any_file_name_can_be_sent(tmp_path: Path, name: str, sent: bytes) -> None:
    (tmp_path / name).write_bytes(b"file")
    assert sent in read_body([tmp_path / name, b"other"])
    assert build_request([tmp_path / name, b"other"], {})[0] == [name, None]
