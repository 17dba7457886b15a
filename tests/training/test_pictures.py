"""Pictures of a model's best and worst images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

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
