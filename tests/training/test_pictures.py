"""Pictures of a model's best, middle and worst images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.support.blob_model import publish
from tests.support.tiny import annotation_of, disc, write_image, write_split
from training.pictures import main, match_f1, side_by_side


def _rle(y: int, x: int, side: int = 4) -> dict[str, object]:
    mask = np.zeros((20, 20), np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    return dict(coco_mask.encode(mask))


def test_f1_counts_each_object_once() -> None:
    truth = [_rle(0, 0), _rle(10, 10)]
    assert match_f1([_rle(0, 0), _rle(0, 0)], truth) == pytest.approx(0.5)
    assert match_f1(truth, truth) == 1
    assert match_f1([], truth) == 0
    assert match_f1([], []) == 1


def test_side_by_side_shows_three_pictures_at_twice_the_size() -> None:
    assert side_by_side(np.zeros((10, 8, 3), np.uint8), [], []).shape == (20, 3 * 16 + 12, 3)


def test_missing_data_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["nowhere", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert status == 1
    assert "has no labels of a known format" in capsys.readouterr().err


def test_the_worst_the_middle_and_the_best_images_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model finds one object in each image; one, two or three are labelled."""
    annotations = []
    for number, name in enumerate(("two.png", "one.png", "three.png"), start=1):
        image = np.zeros((64, 64, 3), np.uint8)
        image[disc(64, 64, 16, 16, 9) > 0, 0] = 255
        write_image(tmp_path / "images" / name, image)
        for x in (16, 48, 32)[: {"one.png": 1, "two.png": 2, "three.png": 3}[name]]:
            annotations.append(annotation_of(disc(64, 64, x, x, 9), number, 3))
    files = [(name, 64, 64) for name in ("two.png", "one.png", "three.png")]
    write_split(tmp_path, "val", files, annotations)
    out = tmp_path / "out"
    arguments = [str(publish(tmp_path / "repo")), "--data", str(tmp_path), "--out", str(out)]
    assert main([*arguments, "--count", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "worst_1.png: three.png",
        "median_1.png: two.png",
        "best_1.png: one.png",
    ]
    assert "F1 0.50" in lines[0] and "F1 1.00" in lines[2]
    assert {path.name for path in out.iterdir()} == {line.split(":")[0] for line in lines}
