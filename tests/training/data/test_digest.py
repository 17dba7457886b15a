from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.tiny import build_tiny_data
from training.data.coco import CocoDataset
from training.data.digest import data_digest


def test_a_digest_follows_annotations_and_sizes_of_images(tmp_path: Path) -> None:
    first, second = (build_tiny_data(tmp_path / name) for name in ("a", "b"))
    digest = data_digest(CocoDataset(first, "train"))
    assert digest == data_digest(CocoDataset(second, "train"))
    assert digest != data_digest(CocoDataset(first, "val"))
    image = second / "images" / "train3.png"
    image.write_bytes(image.read_bytes() + b"x")
    assert digest != data_digest(CocoDataset(second, "train"))
    file = first / "annotations" / "train.json"
    file.write_text(file.read_text() + " ")
    assert digest == data_digest(CocoDataset(first, "train"))
    content = json.loads(file.read_text())
    content["annotations"].pop()
    file.write_text(json.dumps(content))
    assert digest != data_digest(CocoDataset(first, "train"))


def test_a_missing_image_is_an_error(tmp_path: Path) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    (tmp_path / "images" / "train2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"train2\.png"):
        data_digest(data)
