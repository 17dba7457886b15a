"""Faults of each format: one line that names the file and the value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.label_formats import (
    build_scenes,
    write_cvat,
    write_instance_files,
    write_label_images,
    write_labelme,
    write_voc,
    write_yolo,
)
from training.data.formats import open_dataset
from training.data.records import DatasetError

Change = Callable[[bytes], bytes]


def shape(**changes: Any) -> Change:
    """Changes the first shape of a LabelMe file."""

    def change(data: bytes) -> bytes:
        content = json.loads(data)
        content["shapes"][0] |= changes
        return json.dumps(content).encode()

    return change


def put(old: str, new: str | bytes) -> Change:
    def change(data: bytes) -> bytes:
        assert old.encode() in data
        return data.replace(old.encode(), new if isinstance(new, bytes) else new.encode(), 1)

    return change


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def latin(data: bytes) -> bytes:
    return data + b"\xe9"


POINTS = [[1.0, 1.0], [20.0, 1.0], [20.0, 20.0]]
LABELME: list[tuple[Change, str]] = [
    (truncated, "is not JSON"),
    (latin, "is not UTF-8: byte 0xe9"),
    (lambda _: b"[" * 100_000, "is not JSON"),
    (lambda _: b"[]", "holds a JSON list"),
    (lambda _: b"{}", "no list 'shapes'"),
    (shape(label=None), r"shapes\[0\]: the label None"),
    (shape(points=[[1, float("nan")], *POINTS]), r"shapes\[0\]: nan is not a finite"),
    (shape(points=[[None, 1], *POINTS]), r"shapes\[0\]: None is not a finite"),
    (shape(points=[[1e9, 1], *POINTS]), r"shapes\[0\]: the coordinate x = 1e\+09"),
    (shape(points=[[1], *POINTS]), r"\[1\] is not a point"),
    (shape(points=7), "7 is not a list of points"),
    (shape(shape_type="star"), "shape type 'star' is not known"),
    (shape(shape_type="circle"), "circle has 4 points, not 2"),
    (shape(shape_type="rectangle"), "rectangle has 4 points, not 2"),
    (shape(shape_type="mask", mask="??"), r"'\?\?' is not base64"),
    (shape(shape_type="mask", mask="QUJD"), "mask cannot be decoded"),
    (put('"imageHeight": 64', '"imageHeight": 65'), "image of 64x65 px, .*is 64x64"),
]
YOLO: list[tuple[Change, str]] = [
    (latin, "is not UTF-8"),
    (put("0 ", "2 "), r"line 1: the class '2' is not in 0\.\.1"),
    (put("0 ", "-1 "), "the class '-1'"),
    (put("0 ", "box "), "'box' is not a finite number"),
    (put("0.53125", "nan"), "'nan' is not a finite number"),
    (put("0.53125", "1e9"), r"coordinate 1e\+09 is not a fraction"),
    (put("0.53125", "34"), "coordinate 34 is not a fraction"),
    (lambda _: b"0 0.5 0.5 0.1 0.1", "line 1 is a box"),
    (lambda _: b"0 0.5 0.5 0.1 0.1 0.2", "has 6 values"),
]
CVAT: list[tuple[Change, str]] = [
    (truncated, "is not XML"),
    (put("train1", b"train\xff1"), "is not XML"),
    (put("train1.png", "gone.png"), r"image 'gone.png': its image .*does not exist"),
    (put('label="box"', 'label="cat"'), "label 'cat' is not listed"),
    (put("34.0,30.0", "nan,30.0"), "'nan' is not a finite"),
    (put("34.0,30.0", "1e9,30.0"), r"coordinate x = 1e\+09"),
    (put("34.0,30.0", "34.0"), "is not a point"),
    (put('width="64"', 'width="63"'), "63x64 px"),
    (put('height="64"', ""), "None is not a finite"),
    (put("<image ", "<track/><image "), "CVAT for video"),
]


def check(root: Path, file: Path, change: Change, message: str, named: str = "") -> None:
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DatasetError) as caught:
        open_dataset(root, "train")
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and (named or str(file)) in text
    assert re.search(message, text), text


@pytest.mark.parametrize(("change", "message"), LABELME)
def test_labelme(tmp_path: Path, change: Change, message: str) -> None:
    write_labelme(tmp_path, build_scenes(masks=False))
    check(tmp_path, tmp_path / "train" / "train1.json", change, message)


def test_labelme_image_is_missing(tmp_path: Path) -> None:
    write_labelme(tmp_path, build_scenes())
    (tmp_path / "train" / "train2.png").unlink()
    file = tmp_path / "train" / "train2.json"
    check(tmp_path, file, lambda data: data, "image 'train2.png' does not exist")


@pytest.mark.parametrize(("change", "message"), YOLO)
def test_yolo(tmp_path: Path, change: Change, message: str) -> None:
    write_yolo(tmp_path, build_scenes(masks=False))
    check(tmp_path, tmp_path / "labels" / "train" / "train1.txt", change, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [", "is not YAML"),
        ("names: 3", "names is 3"),
        ("names: {0: a, 2: b}", "keys"),
        ("nc: 3\nnames: [a, b]", "nc is 3, there are 2 names"),
        ("names: [a, b]\ntrain: nowhere", "train: 'nowhere' does not exist"),
        ("- names", "has no class names"),
    ],
)
def test_yolo_yaml(tmp_path: Path, text: str, message: str) -> None:
    write_yolo(tmp_path, build_scenes(masks=False))
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(tmp_path, "train", "yolo")
    assert "\n" not in str(caught.value)


def test_yolo_labels_without_an_image_and_image_without_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_yolo(tmp_path, build_scenes(masks=False))
    (tmp_path / "labels" / "train" / "train1.txt").unlink()
    assert len(open_dataset(tmp_path, "train").images) == 3
    assert "images without a label file taken as empty: 1" in caplog.text
    (tmp_path / "images" / "train" / "train2.png").unlink()
    with pytest.raises(DatasetError, match=r"train2\.txt has no image"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize(("change", "message"), CVAT)
def test_cvat(tmp_path: Path, change: Change, message: str) -> None:
    write_cvat(tmp_path, build_scenes(masks=False))
    check(tmp_path, tmp_path / "annotations.xml", change, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('rle="0, ', 'rle="7, ', "rle gives"),
        ('rle="0, ', 'rle="-1, ', "count -1"),
        ('rle="0, ', 'rle="nan, ', "is not a finite"),
        ('left="34"', 'left="60"', "reaches outside"),
        ('width="8" height="16"', 'width="999999" height="999999"', "does not fit"),
    ],
)
def test_cvat_masks(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_cvat(tmp_path, build_scenes())
    check(tmp_path, tmp_path / "annotations.xml", put(old, new), message)


def save(path: Path, pixels: Any) -> None:
    Image.fromarray(np.asarray(pixels)).save(path)


def test_voc(tmp_path: Path) -> None:
    write_voc(tmp_path, build_scenes())
    kinds = tmp_path / "SegmentationClass" / "train1.png"
    good = kinds.read_bytes()
    for pixels, message in [
        (np.full((64, 64), 3, np.uint8), "has the class 3, there are 2"),
        (np.zeros((64, 64), np.uint8), "object 1 has no class"),
        (np.zeros((9, 64), np.uint8), "64x9 px"),
        (np.full((64, 64, 3), 5, np.uint8), r"colour \[5, 5, 5\], which labelmap.txt lacks"),
    ]:
        save(kinds, pixels)
        check(tmp_path, kinds, lambda data: data, message)
    check(tmp_path, kinds, truncated, "cannot be decoded")
    kinds.write_bytes(good)
    (tmp_path / "JPEGImages" / "train1.png").unlink()
    check(tmp_path, kinds, lambda data: data, "does not exist", "train1.jpg")


def test_voc_labelmap(tmp_path: Path) -> None:
    write_voc(tmp_path, build_scenes())
    check(tmp_path, tmp_path / "labelmap.txt", lambda _: b"box:red::", "line 1: 'box:red::'")


def test_label_images(tmp_path: Path) -> None:
    write_label_images(tmp_path, build_scenes())
    mask = tmp_path / "train" / "masks" / "train1.png"
    for pixels, message in [
        (np.zeros((9, 64), np.uint16), "64x9 px"),
        (np.zeros((64, 64, 3), np.uint8), "3 channels"),
    ]:
        save(mask, pixels)
        check(tmp_path, mask, lambda data: data, message)
    check(tmp_path, mask, truncated, "cannot be decoded")
    mask.unlink()
    save(mask.with_suffix(".tif"), np.zeros((64, 64), np.float32))
    check(tmp_path, mask.with_suffix(".tif"), lambda data: data, "mode F")
    mask.with_suffix(".tif").rename(mask.with_name("other.tif"))
    check(tmp_path, mask.with_name("other.tif"), lambda data: data, "no image of the same name")


def test_instance_files(tmp_path: Path) -> None:
    write_instance_files(tmp_path, build_scenes())
    mask = tmp_path / "train" / "train1" / "masks" / "0001.png"
    save(mask, np.ones((9, 64), np.uint8))
    check(tmp_path, mask, lambda data: data, "64x9 px")
    check(tmp_path, mask, truncated, "cannot be decoded")


@pytest.mark.parametrize("image", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n"])
def test_an_image_that_cannot_be_read(tmp_path: Path, image: bytes) -> None:
    write_labelme(tmp_path, build_scenes())
    check(tmp_path, tmp_path / "train" / "train1.png", lambda _: image, "its image")
