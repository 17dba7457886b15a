from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from solo_client import Instance, Result
from tests.solo_client.conftest import INSTANCE

MASK = np.array([[0, 1, 1, 0]] * 3, bool)


def build_instance(*, masks: bool = True) -> Instance:
    rle = INSTANCE["segmentation"] if masks else None
    return Instance(10, "red", 0.9, (1, 0, 2, 3), 6, rle)


def build_result(*instances: Instance) -> Result:
    return Result("a.png", 3, 4, instances, "blobs", 2, "segmentation", {"total": 1.5})


def test_masks_are_arrays_decoded_once() -> None:
    instance = build_instance()
    assert instance.mask.dtype == bool
    assert (instance.mask == MASK).all()
    assert instance.mask is instance.mask
    assert (build_result(instance, build_instance()).masks == np.stack([MASK, MASK])).all()


def test_numbers_are_arrays() -> None:
    result = build_result(build_instance(), build_instance())
    assert result.scores.tolist() == pytest.approx([0.9, 0.9])
    assert result.category_ids.tolist() == [10, 10]
    assert result.boxes_xyxy.tolist() == [[1, 0, 3, 3]] * 2


def test_nothing_found_has_shapes() -> None:
    result = build_result()
    assert (result.scores.shape, result.category_ids.shape) == ((0,), (0,))
    assert (result.boxes_xyxy.shape, result.masks.shape) == ((0, 4), (0, 3, 4))
    assert result.to_coco(1) == []


def test_without_masks_the_reason_is_said() -> None:
    result = build_result(build_instance(masks=False))
    with pytest.raises(ValueError, match="masks=False"):
        _ = result.masks
    assert "segmentation" not in result.to_coco(1)[0]


def test_coco_results_load(tmp_path: Path) -> None:
    results = build_result(build_instance()).to_coco(7)
    assert results == [{"image_id": 7, **INSTANCE}]
    truth = {
        "images": [{"id": 7, "width": 4, "height": 3}],
        "categories": [{"id": 10, "name": "red"}],
        "annotations": [],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    loaded = COCO(str(tmp_path / "truth.json")).loadRes(str(tmp_path / "results.json"))
    assert (loaded.annToMask(loaded.anns[1]) == MASK).all()


def test_supervision_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        build_result().to_supervision()


def test_supervision_gets_what_its_detections_take(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    fake = SimpleNamespace(Detections=lambda **fields: made.append(fields))
    monkeypatch.setitem(sys.modules, "supervision", fake)
    build_result(build_instance()).to_supervision()
    build_result(build_instance(masks=False)).to_supervision()
    assert made[0]["xyxy"].tolist() == [[1, 0, 3, 3]]
    assert (made[0]["mask"] == MASK[None]).all()
    assert made[0]["class_id"].dtype.kind == "i"
    assert made[0]["data"]["class_name"].tolist() == ["red"]
    assert made[1]["mask"] is None


def test_the_real_supervision_takes_it() -> None:
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    for result in (build_result(build_instance(), build_instance()), build_result()):
        detections = result.to_supervision()
        assert isinstance(detections, supervision.Detections)
        assert len(detections) == len(result.instances)
