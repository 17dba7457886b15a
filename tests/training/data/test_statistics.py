from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.tiny import annotation_of, disc
from training.configs.statistics import DataStatistics
from training.data.coco import CocoDataset
from training.data.statistics import measure_statistics


def measure(root: Path, *images: NDArray[np.uint8 | np.uint16], objects: int = 1) -> DataStatistics:
    """Statistics of PNG files, each with discs of 9 px diameter."""
    (root / "images").mkdir()
    (root / "annotations").mkdir()
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, image in enumerate(images, 1):
        cv2.imwrite(str(root / "images" / f"{i}.png"), image)
        height, width = image.shape[:2]
        rows.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        for x in range(objects):
            mask = disc(height, width, 10, 10 + 12 * x, 4)
            annotations.append({"id": len(annotations) + 1, **annotation_of(mask, i, 1)})
    content = {
        "images": rows,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "box"}],
    }
    (root / "annotations" / "train.json").write_text(json.dumps(content))
    return measure_statistics(CocoDataset(root, "train"))


def noise(*shape: int, high: int = 256) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, high, shape, np.uint8)


def test_sizes_and_numbers(tmp_path: Path) -> None:
    found = measure(tmp_path, noise(40, 60, 3), noise(40, 60, 3), objects=2)
    assert (found.num_images, found.num_classes) == (2, 2)
    assert [image.image_hw for image in found.sample] == [(40, 60)] * 2
    assert found.objects_per_image.tolist() == [2, 2]
    assert found.sizes.tolist() == [9, 9, 9, 9]
    assert found.sample[0].centres_xy.tolist() == [[10.5, 10.5], [22.5, 10.5]]


def test_colour_and_range(tmp_path: Path) -> None:
    found = measure(tmp_path, noise(40, 60, 3))
    assert not found.grey and found.bits == 8 and found.intensity_range > 240


def test_grey_and_dark(tmp_path: Path) -> None:
    found = measure(tmp_path, noise(40, 60, high=50))
    assert found.grey and found.intensity_range < 50 and found.bright_share == 0


def test_sixteen_bits(tmp_path: Path) -> None:
    found = measure(tmp_path, noise(40, 60), np.full((40, 60), 60_000, np.uint16))
    assert found.bits == 16 and found.grey


def test_dark_and_bright_backgrounds(tmp_path: Path) -> None:
    dark, bright = np.full((40, 60), 90, np.uint8), np.full((40, 60), 200, np.uint8)
    found = measure(tmp_path, dark, bright, bright)
    assert found.grey and found.bright_share == pytest.approx(2 / 3)


def test_no_objects_and_no_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert measure(tmp_path / "a", noise(40, 60), objects=0).sizes.size == 0
    empty = measure(tmp_path / "b")
    assert (empty.num_images, empty.sample, empty.sizes.size) == (0, (), 0)
