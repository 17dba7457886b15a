from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.label_formats import (
    CLASS_NAMES,
    Scene,
    build_scenes,
    write_coco,
    write_cvat,
    write_instance_files,
    write_label_images,
    write_labelme,
    write_voc,
    write_yolo,
)
from tests.support.tiny import TINY
from training.data.coco import CocoDataset
from training.data.formats import choose_format, list_splits, open_dataset
from training.data.formats.convert import convert
from training.data.records import DatasetError
from training.run_options import RunOptions
from training.trainer import Trainer

Write = Callable[[Path, Sequence[Scene]], None]
MASKS: dict[str, Write] = {"labelme": write_labelme, "cvat": write_cvat, "voc": write_voc}
POLYGONS: dict[str, Write] = {"labelme": write_labelme, "cvat": write_cvat, "yolo": write_yolo}
ONE_CLASS: dict[str, Write] = {"label_images": write_label_images, "files": write_instance_files}
CASES = (
    [(write, True, name) for name, write in MASKS.items()]
    + [(write, False, name) for name, write in POLYGONS.items()]
    + [(write, True, name) for name, write in ONE_CLASS.items()]
)
NAMES = ("coco", "yolo", "labelme", "cvat", "voc", "masks")


def as_one_class(scenes: list[Scene]) -> list[Scene]:
    return [replace(s, shapes=[replace(o, label=0) for o in s.shapes]) for s in scenes]


def objects_of(data: CocoDataset) -> list[Any]:
    return [
        (r.height, r.width, [(a.rle["counts"], a.label) for a in r.annotations])
        for r in data.records
    ]


@pytest.mark.parametrize(("write", "masks", "name"), CASES)
def test_every_format_gives_the_records_of_coco(
    tmp_path: Path, write: Write, masks: bool, name: str
) -> None:
    scenes = build_scenes(masks=masks)
    if name in ONE_CLASS:
        scenes = as_one_class(scenes)
    write_coco(tmp_path / "coco", scenes)
    write(tmp_path / "other", scenes)
    expected, found = (CocoDataset(tmp_path / f, "train") for f in ("coco", "other"))
    assert objects_of(found) == objects_of(expected)
    assert [len(r.objects) for r in found.records] == [2, 2, 0]
    for index in range(3):
        np.testing.assert_array_equal(found.image(index), expected.image(index))
    names = [c.name for c in found.classes]
    assert names == (["object"] if name in ONE_CLASS else ["box", "disc"])


@pytest.mark.parametrize(("write", "masks", "name"), CASES)
def test_a_converted_data_set_has_the_same_records(
    tmp_path: Path, write: Write, masks: bool, name: str
) -> None:
    write(tmp_path / "other", as_one_class(build_scenes(masks=masks)))
    expected = CocoDataset(tmp_path / "other", "train")
    convert(tmp_path / "other", tmp_path / "folder", splits=["train"])
    convert(tmp_path / "other", tmp_path / "single" / "all.json")
    single = open_dataset(tmp_path / "single", "")
    rows = list(single.annotations or ())
    assert [row["id"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["area"] > 0 and len(row["bbox"]) == 4
    found = CocoDataset(tmp_path / "folder", "train")
    assert objects_of(found) == objects_of(expected) and found.classes == expected.classes
    np.testing.assert_array_equal(found.image(1), expected.image(1))
    assert [str(i["file_name"]) for i in single.images] != []
    for image in single.images:
        assert (single.image_folder / image["file_name"]).is_file()


def train(root: Path, out: Path) -> dict[str, torch.Tensor]:
    data = CocoDataset(root, "train")
    config = replace(
        TINY,
        classes=data.classes,
        num_classes=len(data.classes),
        schedule=replace(TINY.schedule, epochs=1, batch_size=3),
    )
    trainer = Trainer(config, data, RunOptions(out=out, workers=0), None)
    trainer.fit()
    assert trainer.step == 1
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def test_six_formats_train_to_the_same_weights(tmp_path: Path) -> None:
    masks, outlines = build_scenes(), build_scenes(masks=False)
    one_class = as_one_class(masks)
    pairs: list[tuple[list[Scene], list[Write]]] = [
        (masks, [write_labelme, write_cvat, write_voc]),
        (outlines, [write_yolo]),
        (one_class, [write_label_images]),
    ]
    trained = []
    for number, (scenes, writers) in enumerate(pairs):
        names = ("object",) if scenes is one_class else CLASS_NAMES
        write_coco(tmp_path / f"coco{number}", scenes, classes=names)
        expected = train(tmp_path / f"coco{number}", tmp_path / f"run{number}")
        trained.append(expected)
        for write in writers:
            root = tmp_path / f"other{number}_{len(list(tmp_path.iterdir()))}"
            write(root, scenes)
            found = train(root, tmp_path / f"run_{root.name}")
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(found[key], value), (write, key)
    assert any(not torch.equal(value, trained[1][key]) for key, value in trained[0].items())


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_coco, "coco"),
        (write_yolo, "yolo"),
        (write_labelme, "labelme"),
        (write_cvat, "cvat"),
        (write_voc, "voc"),
        (write_label_images, "masks"),
        (write_instance_files, "masks"),
    ],
)
def test_the_format_is_found(tmp_path: Path, write: Write, name: str) -> None:
    write(tmp_path, build_scenes())
    assert choose_format(tmp_path, None) == name


def test_two_formats_are_ambiguous_until_one_is_chosen(tmp_path: Path) -> None:
    write_coco(tmp_path, build_scenes())
    write_voc(tmp_path, build_scenes())
    with pytest.raises(DatasetError, match=r"may be coco \(.*train\.json\), voc \(.*--format"):
        CocoDataset(tmp_path, "train")
    for name in ("coco", "voc"):
        assert len(CocoDataset(tmp_path, "train", format=name)) == 3


def test_no_format_and_an_unknown_one(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no labels of a known format .*, only an empty folder"):
        open_dataset(tmp_path, "train")
    for name in ("a.JPG", "b.jpg", "README"):
        (tmp_path / name).touch()
    with pytest.raises(DatasetError, match=r", only 2 \.jpg files, 1 other files$"):
        open_dataset(tmp_path, "train")
    with pytest.raises(DatasetError, match="'pickle' is not one of coco"):
        open_dataset(tmp_path, "train", "pickle")
    with pytest.raises(DatasetError, match="is not a folder"):
        open_dataset(tmp_path / "none", "train")
    for format in (None, "coco", "labelme"):
        with pytest.raises(DatasetError, match=r"a\.JPG is a file; give the folder"):
            open_dataset(tmp_path / "a.JPG", "train", format)
        with pytest.raises(DatasetError, match=r"a\.JPG is a file; give the folder"):
            list_splits(tmp_path / "a.JPG", format)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_refused_in_every_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=str(tmp_path)):
        open_dataset(tmp_path, "train", name)


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    write_labelme(tmp_path, build_scenes())
    with pytest.raises(DatasetError, match=r"no split 'val', only train.*--val-fraction"):
        open_dataset(tmp_path, "val")
    train, val = (open_dataset(tmp_path, s, None, 0.4) for s in ("train", "val"))
    assert (len(train.images), len(val.images)) == (2, 1)
    write_labelme(tmp_path, build_scenes("val"), "valid")
    assert len(open_dataset(tmp_path, "val").images) == 3
    with pytest.raises(DatasetError, match="has a split for validation"):
        open_dataset(tmp_path, "train", None, 0.4)


def test_roboflow_and_a_single_coco_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_coco(tmp_path / "a", build_scenes())
    for split in ("train", "valid"):
        (tmp_path / "rf" / split).mkdir(parents=True)
        for image in (tmp_path / "a" / "images").iterdir():
            (tmp_path / "rf" / split / image.name).write_bytes(image.read_bytes())
        text = (tmp_path / "a" / "annotations" / "train.json").read_text()
        (tmp_path / "rf" / split / "_annotations.coco.json").write_text(text)
    expected = objects_of(CocoDataset(tmp_path / "a", "train"))
    assert objects_of(CocoDataset(tmp_path / "rf", "train")) == expected
    assert objects_of(CocoDataset(tmp_path / "rf", "val")) == expected
    file = tmp_path / "a" / "annotations" / "train.json"
    file.rename(file.with_name("instances_default.json"))
    train, val = (CocoDataset(tmp_path / "a", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    assert not {r.image_id for r in train.records} & {r.image_id for r in val.records}
    assert sum(len(r.objects) for d in (train, val) for r in d.records) == 4
    assert "divided into 2 for training and 1 for validation" in caplog.text


def test_coco_without_a_validation_split_is_divided_on_request(tmp_path: Path) -> None:
    write_coco(tmp_path, build_scenes())
    with pytest.raises(DatasetError, match="no annotations of split 'val'"):
        CocoDataset(tmp_path, "val")
    assert len(CocoDataset(tmp_path, "val", val_fraction=0.4)) == 1
    assert len(CocoDataset(tmp_path, "train", val_fraction=0.4)) == 2
    write_coco(tmp_path, build_scenes("test"), "test")
    assert len(CocoDataset(tmp_path, "test", val_fraction=0.4)) == 3
    write_coco(tmp_path, build_scenes("val"), "val")
    with pytest.raises(DatasetError, match="leave the fraction out"):
        CocoDataset(tmp_path, "train", val_fraction=0.4)


@pytest.mark.parametrize("write", [write_coco, write_labelme])
def test_the_fraction_0_leaves_all_images_for_training(tmp_path: Path, write: Write) -> None:
    write(tmp_path, build_scenes())
    if write is write_labelme:
        (tmp_path / "train").rename(tmp_path / "all")
    else:
        file = tmp_path / "annotations" / "train.json"
        file.rename(file.with_name("all.json"))
    assert len(CocoDataset(tmp_path, "train")) == 2
    assert len(CocoDataset(tmp_path, "train", val_fraction=0)) == 3
    with pytest.raises(DatasetError, match="no split for validation, and the fraction for it is 0"):
        CocoDataset(tmp_path, "val", val_fraction=0)
    write(tmp_path / "divided", build_scenes())
    assert len(CocoDataset(tmp_path / "divided", "train", val_fraction=0)) == 3
    assert len(convert(tmp_path, tmp_path / "out", val_fraction=0, format=None)) == 1


def test_one_file_of_several_coco_files_needs_a_split(tmp_path: Path) -> None:
    write_coco(tmp_path / "in", build_scenes())
    convert(tmp_path / "in", tmp_path / "train.json")
    write_coco(tmp_path / "in", build_scenes("val"), "val")
    with pytest.raises(DatasetError, match=r"splits train, val: choose one with --split"):
        convert(tmp_path / "in", tmp_path / "all.json")
    (line,) = convert(tmp_path / "in", tmp_path / "all.json", splits=["val"])
    assert line.endswith("all.json: 3 images, 4 objects, 2 classes")


def test_annotations_are_parsed_for_every_iteration(tmp_path: Path) -> None:
    write_coco(tmp_path, build_scenes())
    content = open_dataset(tmp_path, "train", None, 0.4)
    assert content.annotations is not None
    first = list(content.annotations)
    assert first and first == list(content.annotations)
    assert {row["image_id"] for row in first} <= {image["id"] for image in content.images}
    assert json.dumps(first)
