"""Data sets that label different classes, joined and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tiny import annotation_of, disc, write_image
from training.data.coco import CocoDataset
from training.data.formats.join import join
from training.data.records import DatasetError
from training.data_command import main

SIDE = 48
Image = dict[str, Any]


def write_set(
    root: Path, categories: dict[int, str], images: list[Image], split: str = "train"
) -> Path:
    """Images with `objects`, category ids, each a disc of its own."""
    entries: list[Image] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        name = f"{split}{number}.png"
        write_image(root / "images" / name, np.full((SIDE, SIDE, 3), 40 * number, np.uint8))
        objects = image.get("objects", [])
        entry = {"id": number, "file_name": name, "height": SIDE, "width": SIDE}
        entry |= {k: v for k, v in image.items() if k != "objects"}
        entries.append(entry)
        for n, category_id in enumerate(objects):
            mask = disc(SIDE, SIDE, 12 + 12 * n, 20, 5)
            annotation = annotation_of(mask, entry["id"], category_id)  # type: ignore[arg-type]
            annotations.append({"id": len(annotations) + 1, **annotation})
    content = {
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }
    path = root / "annotations" / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return root


def known_of(data: CocoDataset) -> list[set[str] | None]:
    """Names of the classes that each image labels exhaustively."""
    names = [c.name for c in data.classes]
    found = [record.exhaustive(len(names)) for record in data.records]
    return [None if f is None else {names[i] for i in np.flatnonzero(f)} for f in found]


def objects_of(data: CocoDataset) -> list[list[str]]:
    return [[data.classes[o.label].name for o in r.annotations] for r in data.records]


def test_each_image_knows_the_classes_of_its_own_set(tmp_path: Path) -> None:
    cats = write_set(tmp_path / "a/set", {1: "cat", 2: "dog"}, [{"objects": [1, 1]}, {}])
    dogs = write_set(tmp_path / "b/set", {7: "dog", 9: "cow"}, [{"objects": [9, 7]}])
    lines = join([cats, dogs], tmp_path / "both")
    assert lines == [f"{tmp_path}/both/annotations/train.json: 3 images, 4 objects, 3 classes"]
    data = CocoDataset(tmp_path / "both", "train")
    assert [c.name for c in data.classes] == ["cat", "dog", "cow"]
    assert objects_of(data) == [["cat", "cat"], [], ["cow", "dog"]]
    assert known_of(data) == [{"cat", "dog"}, {"cat", "dog"}, {"dog", "cow"}]
    pixels = [int(data.image(i)[0, 0, 0]) for i in range(3)]
    assert pixels == [40, 80, 40]


def test_sets_of_the_same_classes_stay_plain(tmp_path: Path) -> None:
    sets = [
        write_set(tmp_path / "a", {1: "cat", 2: "dog"}, [{"objects": [1]}]),
        write_set(tmp_path / "b", {5: "dog", 3: "cat"}, [{"objects": [5]}]),
    ]
    join(sets, tmp_path / "both")
    data = CocoDataset(tmp_path / "both", "train")
    assert known_of(data) == [None, None] and objects_of(data) == [["cat"], ["dog"]]


def test_fields_that_are_there_already_are_kept(tmp_path: Path) -> None:
    images: list[Image] = [
        {"objects": ["2"], "neg_category_ids": [1], "not_exhaustive_category_ids": [2.0]},
        {"objects": [1], "not_exhaustive_category_ids": [2]},
        {"id": "text", "objects": [1]},
    ]
    first = write_set(tmp_path / "a", {1: "cat", 2: "dog"}, images)
    second = write_set(tmp_path / "b", {1: "cow"}, [{}])
    join([first, second], tmp_path / "both")
    data = CocoDataset(tmp_path / "both", "train")
    assert known_of(data) == [{"cat"}, {"cat"}, {"cat", "dog"}, {"cow"}]
    assert objects_of(data) == [["dog"], ["cat"], ["cat"], []]


def test_splits_are_joined_by_name(tmp_path: Path) -> None:
    first = write_set(tmp_path / "a", {1: "cat"}, [{"objects": [1]}])
    write_set(first, {1: "cat"}, [{}, {}], "val")
    second = write_set(tmp_path / "b", {1: "cow"}, [{"objects": [1]}])
    join([first, second], tmp_path / "both")
    sizes = [len(CocoDataset(tmp_path / "both", split)) for split in ("train", "val")]
    assert sizes == [2, 2]


def test_what_is_refused(tmp_path: Path, capsys: Any) -> None:
    good = write_set(tmp_path / "a", {1: "cat"}, [{"objects": [1]}])
    bad = write_set(tmp_path / "b", {1: "cat"}, [{"neg_category_ids": [4]}])
    assert main(["join", str(good), str(bad), "--to", str(tmp_path / "both")]) == 1
    error = capsys.readouterr().err
    assert "neg_category_ids names 4" in error and not (tmp_path / "both").exists()
    with pytest.raises(DatasetError, match="exists"):
        join([good], good)
    assert main(["join", str(good), "--to", str(tmp_path / "new")]) == 0
    assert "1 images, 1 objects, 1 classes" in capsys.readouterr().out


def test_categories_that_only_group_others_do_not_become_classes(tmp_path: Path) -> None:
    grouped = write_set(tmp_path / "a", {0: "pets", 1: "cat", 2: "dog"}, [{"objects": [1]}])
    path = grouped / "annotations/train.json"
    content = json.loads(path.read_text())
    for category in content["categories"][1:]:
        category["supercategory"] = "pets"
    path.write_text(json.dumps(content))
    other = write_set(tmp_path / "b", {1: "dog", 2: "cat"}, [{"objects": [2]}])
    join([grouped, other], tmp_path / "both")
    data = CocoDataset(tmp_path / "both", "train")
    assert [c.name for c in data.classes] == ["cat", "dog"]
    assert known_of(data) == [None, None] and objects_of(data) == [["cat"], ["cat"]]
