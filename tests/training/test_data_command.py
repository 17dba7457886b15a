from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import build_tiny_data
from training.data_command import main


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return build_tiny_data(tmp_path)


def change(root: Path, split: str, **changes: Any) -> None:
    path = root / "annotations" / f"{split}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_data_set_without_faults(root: Path, capsys: Any) -> None:
    assert main(["check", str(root)]) == 0
    train, val, end = capsys.readouterr().out.splitlines()
    assert train.startswith("train: ") and "3 images, 4 objects, 0 crowds, 2 classes" in train
    assert val.startswith("val: ") and end == "training takes it"


def test_every_fault_of_every_split_is_listed(root: Path, capsys: Any) -> None:
    content = json.loads((root / "annotations" / "train.json").read_text())
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    content["annotations"][1]["category_id"] = 99
    change(root, "train", annotations=content["annotations"])
    (root / "images" / "val2.png").unlink()
    assert main(["check", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "refused 1 annotations" in printed and "category 99" in printed
    assert "skipped 1 objects" in printed and "val2.png" in printed
    assert printed.endswith("training refuses it\n")


def test_only_what_is_skipped_is_no_reason_to_refuse(root: Path, capsys: Any) -> None:
    change(root, "train", annotations=[])
    assert main(["check", str(root)]) == 0
    assert "no image has an object" in capsys.readouterr().out


def test_a_fault_of_the_whole_data_set_is_printed_once(tmp_path: Path, capsys: Any) -> None:
    assert main(["check", str(tmp_path)]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"train: {tmp_path} has no labels") and rest == ["training refuses it"]


def test_splits_by_name(root: Path, capsys: Any) -> None:
    (root / "annotations" / "val.json").rename(root / "annotations" / "other.json")
    assert main(["check", str(root)]) == 1
    assert "no annotations of split 'val'" in capsys.readouterr().out
    assert main(["check", str(root), "--split", "other"]) == 0
    assert main(["check", str(root), "--split", "train", "--split", "other"]) == 0


def test_classes_of_the_splits_are_compared(root: Path, capsys: Any) -> None:
    change(root, "val", categories=[{"id": 3, "name": "box"}, {"id": 7, "name": "disc"}])
    assert main(["check", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "category 3 is 'box'" in printed and "train.json calls it 'disc'" in printed


@pytest.mark.parametrize(
    "text", ["", "[]", "\udc80".encode("utf-8", "surrogatepass").decode("latin1")]
)
def test_a_file_that_is_no_json(root: Path, capsys: Any, text: str) -> None:
    (root / "annotations" / "train.json").write_text(text, encoding="latin1")
    assert main(["check", str(root)]) == 1
    assert "train.json is not COCO JSON" in capsys.readouterr().out
