"""Calibration of a folder of model_repo against a labelled split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.model_config import Calibration
from service.models.repository import load_version, read_config
from tests.support.blob_model import draw_picture, publish
from training.calibrate import cross_check, judge, main, write_calibration


def _entry(x: int, width: int, score: float = 1.0, category: int = 1) -> dict[str, Any]:
    mask = np.zeros((10, 40), np.uint8)
    mask[:, x : x + width] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"category_id": category, "score": score, "segmentation": rle, "image_id": 1}


def test_each_object_makes_one_instance_right() -> None:
    objects = [_entry(0, 10), _entry(20, 10), {**_entry(30, 10), "iscrowd": 1}]
    results = [
        _entry(1, 10, 0.5),
        _entry(0, 10, 0.9),
        _entry(20, 4, 0.8),
        _entry(20, 10, 0.7, category=2),
        _entry(21, 10, 0.6),
        _entry(30, 10, 0.4),
    ]
    assert judge(results, objects) == [
        (0.9, True),
        (0.8, False),
        (0.7, False),
        (0.6, True),
        (0.5, False),
        (0.4, False),
    ]
    assert judge([], objects) == []
    assert judge(results[:1], []) == [(0.5, False)]


def test_the_check_uses_the_map_of_the_other_images() -> None:
    sure = [(0.5, True)] * 20
    wrong = [(0.5, False)] * 20
    checked = cross_check({1: sure, 2: wrong, 3: sure, 4: wrong})
    assert [right for _, right in checked] == [True] * 40 + [False] * 40
    assert max(score for score, right in checked if right) < 0.1
    assert min(score for score, right in checked if not right) > 0.9
    with pytest.raises(ValueError, match="too few images"):
        cross_check({1: sure})


def test_the_map_is_stored_with_its_version(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    calibration = Calibration(network=(0, 0.5, 1), reported=(0, 0.8, 1))
    write_calibration(folder, 1, calibration)
    assert read_config(folder).calibration == calibration
    content = json.loads((folder / "config.json").read_text())
    assert content["versions"]["1"]["provenance"] == {"made_by": "tests"}


def test_answers_keep_their_instances(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    faint = draw_picture(48, 48)
    faint[faint > 0] = 150  # a score of 0.59
    for reported in ((0, 0.05, 1), (0, 0.9, 1), (0, 0.5, 1)):
        before = load_version(folder)
        threshold = before.config.postprocess.score_threshold
        write_calibration(folder, 1, Calibration(network=(0, 0.1, 1), reported=reported))
        after = load_version(folder)
        assert after.config.postprocess.score_threshold == pytest.approx(reported[1])
        assert after.config.postprocess.score_threshold != pytest.approx(threshold)
        kept, found = before.segment(faint), after.segment(faint)
        assert [i.rle for i in kept] == [i.rle for i in found] != []
    assert after.config.postprocess.update_threshold == 0.05


def test_a_fault_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(publish(tmp_path)), "--data", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("calibrate: ") and error.count("\n") == 1
