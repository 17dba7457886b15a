"""Layouts of COCO, LVIS and similar data sets: where annotations and images are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tiny import CLASSES, annotation_of, disc, write_image
from training.data.coco import CocoDataset
from training.data.formats import list_splits, open_dataset
from training.data.formats.coco_files import split_of_stem
from training.data.records import DatasetError, FederatedLabels

HEIGHT, WIDTH = 20, 30
URL = "http://images.cocodataset.org/"


def lvis_image(number: int, folder: str = "train2017", **more: Any) -> dict[str, Any]:
    """An image's entry as in LVIS v1."""
    name = f"{number:012}.jpg"
    return {
        "date_captured": "2013-11-15 04:21:11",
        "neg_category_ids": [],
        "id": number,
        "license": 1,
        "height": HEIGHT,
        "width": WIDTH,
        "flickr_url": "http://farm5.staticflickr.com/4104/4986188512_fb04_z.jpg",
        "coco_url": f"{URL}{folder}/{name}",
        "not_exhaustive_category_ids": [],
        **more,
    }


def write_json(path: Path, images: list[dict[str, Any]]) -> None:
    """A file in LVIS's order of keys, with one object in the first image; it has no iscrowd."""
    item = annotation_of(disc(HEIGHT, WIDTH, 8, 9, 5), images[0]["id"], 3)
    del item["iscrowd"]
    categories = [
        {"id": c.category_id, "name": c.name, "frequency": "c", "synset": f"{c.name}.n.01"}
        for c in CLASSES
    ]
    content = {"info": {}, "annotations": [{"id": 1, **item}], "images": images, "licenses": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "categories": categories}))


def write_images(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        write_image(root / name, np.full((HEIGHT, WIDTH, 3), number, np.uint8))


TRAIN = [f"train2017/{n:012}.jpg" for n in (1, 2)]
VAL = ["train2017/000000000003.jpg", "val2017/000000000004.jpg"]  # LVIS's val is of both folders


@pytest.mark.parametrize("folder", ["annotations", "."])
@pytest.mark.parametrize("flat", [False, True])
def test_lvis_as_downloaded(tmp_path: Path, folder: str, flat: bool) -> None:
    train = [lvis_image(1, neg_category_ids=[7]), lvis_image(2, not_exhaustive_category_ids=[7])]
    write_json(tmp_path / folder / "lvis_v1_train.json", train)
    val = [lvis_image(3), lvis_image(4, "val2017", neg_category_ids=[7])]
    write_json(tmp_path / folder / "lvis_v1_val.json", val)
    names = [*TRAIN, *VAL]
    write_images(tmp_path, ["images/" + Path(n).name for n in names] if flat else names)
    found = [CocoDataset(tmp_path, split) for split in ("train", "val", "lvis_v1_val")]
    assert [[r.image_id for r in data.records] for data in found] == [[1, 2], [3, 4], [3, 4]]
    assert found[0].classes == CLASSES and len(found[0].records[0].objects) == 1
    federated = [r.federated for r in found[0].records]
    assert federated[0] == FederatedLabels(frozenset({1}), frozenset())
    assert federated[1] == FederatedLabels(frozenset(), frozenset({1}))
    assert [int(data.image(1).mean()) for data in found] == [1, 3, 3]  # the file of each number
    assert list_splits(tmp_path) == ["train", "val"]


def test_lvis_inside_of_a_folder_of_its_own(tmp_path: Path) -> None:
    """A data set whose only file is not called as a split is divided."""
    write_json(tmp_path / "lvis_v1_train.json", [lvis_image(n) for n in (1, 2)])
    write_images(tmp_path, TRAIN)
    train, val = (CocoDataset(tmp_path, split) for split in ("train", "val"))
    assert [len(train), len(val)] == [1, 1] and list_splits(tmp_path) == [""]


@pytest.mark.parametrize("url", [None, 7, "", "http://", "http://host/", "http://[", "//../.."])
def test_an_image_without_a_name_is_refused_with_its_url(tmp_path: Path, url: Any) -> None:
    write_json(
        tmp_path / "annotations" / "train.json", [lvis_image(1), lvis_image(2, coco_url=url)]
    )
    write_images(tmp_path, TRAIN)
    with pytest.raises(DatasetError) as caught:
        CocoDataset(tmp_path, "train")
    assert "images[1]" in str(caught.value) and f"coco_url {url!r}" in str(caught.value)
    with pytest.raises(DatasetError, match=r"images\[1\] has no id and file_name"):
        open_dataset(tmp_path, "train", None, 0.5)


def test_a_missing_image_is_named_as_its_url_calls_it(tmp_path: Path) -> None:
    write_json(tmp_path / "annotations" / "train.json", [lvis_image(1), lvis_image(2)])
    write_images(tmp_path, TRAIN[:1])
    with pytest.raises(DatasetError, match=r"train2017/000000000002\.jpg"):
        CocoDataset(tmp_path, "train")


def test_a_url_with_escapes_and_a_query(tmp_path: Path) -> None:
    image = lvis_image(1, coco_url="https://host/a/b%20c/d%C3%A9.png?size=1/2#x")
    write_json(tmp_path / "annotations" / "train.json", [image])
    write_images(tmp_path, ["b c/dé.png"])
    assert CocoDataset(tmp_path, "train").records[0].file_name == "b c/dé.png"


@pytest.mark.parametrize(
    ("names", "files", "folder"),
    [
        (["a.png"], ["images/a.png"], "images"),
        (["a.png"], ["images/train/a.png"], "images/train"),
        (["a.png"], ["train/a.png"], "train"),
        (["a.png"], ["training/a.png"], "training"),
        (["a.png"], ["train2014/a.png"], "train2014"),
        (["a.png"], ["a.png"], "."),
        (["a.png"], ["annotations/a.png"], "annotations"),
        (["train/a.png"], ["train/a.png", "train/b.png"], "."),
        (["images/a.png"], ["images/a.png"], "."),
        (["x\\y\\a.png"], ["images/x/y/a.png"], "images"),
        (["a.png", "b.png"], ["images/a.png", "train/a.png", "train/b.png"], "train"),
        (["a.png", "b.png"], ["images/a.png"], "images"),
        (["a.png"], ["images/a.png", "train/a.png"], "images"),
        (["missing.png", "b.png"], ["train/b.png", "images/c.png"], "train"),
    ],
)
def test_images_are_looked_for_where_they_usually_are(
    tmp_path: Path, names: list[str], files: list[str], folder: str
) -> None:
    images = [
        {"id": n, "file_name": name, "height": HEIGHT, "width": WIDTH}
        for n, name in enumerate(names, 1)
    ]
    write_json(tmp_path / "annotations" / "train.json", images)
    write_images(tmp_path, files)
    content = open_dataset(tmp_path, "train")
    assert content.image_folder.relative_to(tmp_path) == Path(folder)
    assert [i["file_name"] for i in content.images] == [n.replace("\\", "/") for n in names]


@pytest.mark.parametrize("images", [None, {}, [], [None, 7, {}], [{"file_name": "a\0b"}]])
def test_images_that_are_none_are_left_to_the_check(tmp_path: Path, images: Any) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    content = {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": []}
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    assert open_dataset(tmp_path, "train").images == images
    if images != []:
        with pytest.raises(DatasetError, match=r"train\.json.*images"):
            CocoDataset(tmp_path, "train")
        with pytest.raises(DatasetError, match=r"train\.json: images"):
            open_dataset(tmp_path, "train", None, 0.5)


def test_several_files_of_one_split_are_named_until_one_is_chosen(tmp_path: Path) -> None:
    for number, stem in enumerate(("lvis_v1_train", "objects_train"), 1):
        write_json(tmp_path / "annotations" / f"{stem}.json", [lvis_image(number)])
    write_images(tmp_path, TRAIN)
    both = r"several files of split 'train': .*lvis_v1_train\.json, .*objects_train\.json; name one"
    with pytest.raises(DatasetError, match=both):
        CocoDataset(tmp_path, "train")
    assert CocoDataset(tmp_path, "objects_train").records[0].image_id == 2
    write_json(tmp_path / "annotations" / "instances_train2017.json", [lvis_image(1)])
    assert CocoDataset(tmp_path, "train").annotation_file.name == "instances_train2017.json"
    with pytest.raises(DatasetError, match="no annotations of split 'val'"):
        CocoDataset(tmp_path, "val")
    for stem in ("a_val", "b_val"):
        write_json(tmp_path / "annotations" / f"{stem}.json", [lvis_image(1)])
    with pytest.raises(DatasetError, match=r"has a split for validation, .*a_val\.json"):
        open_dataset(tmp_path, "train", None, 0.5)


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("train", "train"),
        ("instances_val2017", "val"),
        ("lvis_v1_train", "train"),
        ("zhiyuan_objv2_val", "val"),
        ("image_info_test-dev2017", "test"),
        ("Validation set", "val"),
        ("trainval", ""),
        ("train_val", ""),
        ("minival", ""),
        ("image_info_unlabeled2017", ""),
        ("2017", ""),
        ("", ""),
    ],
)
def test_the_split_in_a_name(stem: str, split: str) -> None:
    assert split_of_stem(stem) == split
