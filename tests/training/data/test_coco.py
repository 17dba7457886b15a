from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.model_config import ContrastSpec
from tests.support.tiny import (
    CLASSES,
    annotation_of,
    build_tiny_data,
    disc,
    rle_of,
    write_image,
    write_split,
)
from training.data.coco import CocoDataset
from training.data.formats.coco_files import find_split
from training.data.records import Annotation, DatasetError, PolygonObject

HEIGHT, WIDTH = 20, 30


def build(root: Path, annotations: list[dict[str, Any]], **image: Any) -> CocoDataset:
    write_image(root / "images" / "a.png", np.full((HEIGHT, WIDTH, 3), 50, np.uint8))
    write_split(root, "train", [("a.png", HEIGHT, WIDTH)], annotations)
    return CocoDataset(root, "train")


def test_polygons_rle_and_uncompressed_rle_are_one_mask(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[4:12, 5:25] = 1
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.r_[0, edges, flat.size]).tolist()
    segmentations: list[Any] = [
        [[5, 4, 25, 4, 25, 12, 5, 12]],
        [[5, 4, 15, 4, 15, 12, 5, 12], [15, 4, 25, 4, 25, 12, 15, 12]],
        {"size": [HEIGHT, WIDTH], "counts": counts},
        rle_of(mask),
    ]
    annotation = annotation_of(mask, 1, 3)
    data = build(tmp_path, [annotation | {"segmentation": s} for s in segmentations])
    assert len(data.records[0].annotations) == 4
    for found in data.records[0].annotations:
        np.testing.assert_array_equal(coco_mask.decode(found.rle), mask)
        assert found.box_xywh == (5, 4, 20, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": [2, 3]},
        {"counts": [2, 3, HEIGHT * WIDTH]},
        {"counts": [-2, 3, HEIGHT * WIDTH - 1]},
        {"counts": [2.5, "3"]},
        {"counts": "23"},
        {"counts": "oooooooo"},
        {"counts": "é"},
        {"counts": None},
        {"size": [HEIGHT]},
        {"size": [HEIGHT, WIDTH + 1]},
        {"size": None},
        {"size": [10**9, 10**9]},
    ],
)
def test_an_rle_that_does_not_fill_its_mask_is_refused_by_its_annotation(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    mask = disc(HEIGHT, WIDTH, 8, 9, 5)
    wrong = annotation_of(mask, 1, 3) | {"segmentation": rle_of(mask) | changes, "id": 4711}
    with pytest.raises(DatasetError, match="annotation 4711"):
        build(tmp_path, [annotation_of(mask, 1, 3), wrong])


@pytest.mark.parametrize("wrong", [1e9, -1e9, float("nan"), float("inf"), None])
def test_a_coordinate_far_from_the_image_is_refused_by_its_annotation(
    tmp_path: Path, wrong: float | None
) -> None:
    mask = disc(HEIGHT, WIDTH, 8, 9, 5)
    near = annotation_of(mask, 1, 3) | {"segmentation": [[-9, -9, 90, 0, 5, 50]]}
    assert len(build(tmp_path, [near]).records[0].annotations) == 1
    far = annotation_of(mask, 1, 3) | {"segmentation": [[0, 0, wrong, 0, 5, 5]], "id": 4711}
    with pytest.raises(DatasetError, match=r"annotation 4711 .* coordinate"):
        build(tmp_path, [near, far])


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("categories", [{"id": 1}]),
        ("categories", [{"id": -1, "name": "a"}]),
        ("categories", [None]),
        ("categories", 5),
        ("images", [{"id": 1}]),
        ("images", [{"id": "a", "file_name": "a", "height": 1, "width": 1}]),
        ("images", [{"id": 1, "file_name": "a", "height": 1e999, "width": 1}]),
        ("images", None),
    ],
)
def test_a_field_that_is_wrong_is_an_error_of_the_data_set(
    tmp_path: Path, part: str, value: Any
) -> None:
    build(tmp_path, [])
    file = tmp_path / "annotations" / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
    with pytest.raises(DatasetError, match=r"train\.json"):
        CocoDataset(tmp_path, "train")


def test_endless_nesting_is_an_error_of_the_data_set(tmp_path: Path) -> None:
    build(tmp_path, [])
    (tmp_path / "annotations" / "train.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(DatasetError, match=r"train\.json"):
        CocoDataset(tmp_path, "train")


def test_crowds_and_empty_segmentations_are_left_out(tmp_path: Path) -> None:
    mask = disc(HEIGHT, WIDTH, 8, 9, 5)
    data = build(
        tmp_path,
        [
            annotation_of(mask, 1, 3, iscrowd=1),
            annotation_of(mask, 1, 7),
            annotation_of(mask, 1, 7) | {"segmentation": []},
        ],
    )
    assert [a.label for a in data.records[0].annotations] == [1]


def test_images_without_objects_are_kept(tmp_path: Path) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    assert len(data) == 3
    assert [len(r.annotations) for r in data.records] == [2, 2, 0]
    assert build(tmp_path / "b", []).records[0].annotations == ()


def test_images_without_objects_can_be_left_out(tmp_path: Path) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    data.records = data.records[::-1]
    whole = data.image(0)
    some = data.with_objects()
    assert [r.file_name for r in some.records] == ["train2.png", "train1.png"] and len(data) == 3
    assert some.image(0).shape != whole.shape  # no image of the other order is taken from a cache
    empty = build(tmp_path / "b", [])
    assert len(empty) > 0 and empty.with_objects() is empty


@pytest.mark.parametrize(
    ("below", "copies"),
    [
        (0.0, [1, 1, 1, 1, 1]),
        (0.2, [1, 1, 1, 1, 1]),  # the rarest class is in a fifth of the images
        (0.44, [1, 1, 1, 1, 1]),  # sqrt(0.44 / 0.2) is 1.48
        (0.46, [1, 1, 1, 2, 1]),
        (1.0, [1, 1, 1, 2, 1]),
    ],
)
def test_images_of_rare_classes_are_repeated(
    tmp_path: Path, below: float, copies: list[int]
) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    common, rare = data.records[0].objects
    objects = [(common,), (common,), (common,), (common, rare), ()]
    data.records = [
        replace(data.records[0], image_id=number, objects=found)
        for number, found in enumerate(objects)
    ]
    found = data.with_repeats(below)
    assert [r.image_id for r in found.records] == [
        number for number, count in enumerate(copies) for _ in range(count)
    ]
    assert (found is data) is (len(found) == len(data))
    assert found.image(len(found) - 1) is not None and len(data) == 5


def test_labels_are_contiguous_in_the_order_of_the_category_ids(tmp_path: Path) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "val")
    assert data.classes == CLASSES
    assert [a.label for a in data.records[0].annotations] == [0, 1]


def test_greyscale_sixteen_bit_and_exif(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    grey = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    Image.fromarray(grey).save(images / "grey.png")
    turned = Image.fromarray(np.rot90(np.stack([grey] * 3, axis=2), 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned.save(images / "turned.jpg", exif=exif, quality=100, subsampling=0)
    write_split(tmp_path, "train", [("grey.png", HEIGHT, WIDTH), ("turned.jpg", HEIGHT, WIDTH)], [])
    data = CocoDataset(tmp_path, "train")
    np.testing.assert_array_equal(data.image(0), np.stack([grey] * 3, axis=2))
    assert data.image(1).shape == (HEIGHT, WIDTH, 3)
    assert np.abs(data.image(1)[..., 0].astype(int) - grey).mean() < 20


def test_contrast_is_applied_to_the_whole_image(tmp_path: Path) -> None:
    dark = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    dark[:, ::2] = 20
    write_image(tmp_path / "images" / "a.png", dark)
    write_split(tmp_path, "train", [("a.png", HEIGHT, WIDTH)], [])
    data = CocoDataset(tmp_path, "train", ContrastSpec(low=0, high=100, min_range=1))
    assert data.image(0).max() == 255 and data.image(0).min() == 0
    assert data.image(0) is data.image(0)  # kept in memory


def test_the_size_must_be_the_annotations(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    write_split(tmp_path, "train", [("a.png", WIDTH, HEIGHT)], [])
    with pytest.raises(DatasetError, match=r"a\.png.* is 30x20 px, its annotation says 20x30"):
        CocoDataset(tmp_path, "train")


def test_a_file_that_changes_its_size_in_the_run_is_named(tmp_path: Path) -> None:
    data = build(tmp_path, [])
    write_image(tmp_path / "images" / "a.png", np.zeros((WIDTH, HEIGHT, 3), np.uint8))
    with pytest.raises(DatasetError, match=r"a\.png is 20x30 px, its annotation says 30x20"):
        data.image(0)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    data = build(tmp_path, [])
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"a\.png"):
        data.image(0)


def test_a_missing_split_says_where_it_looked(tmp_path: Path) -> None:
    build_tiny_data(tmp_path)
    with pytest.raises(DatasetError, match=r"'test'.*test\.json.*instances_test2017\.json"):
        CocoDataset(tmp_path, "test")


def test_missing_images(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [], [])
    with pytest.raises(DatasetError, match="no image folder"):
        CocoDataset(tmp_path, "train")


def test_coco_2017_as_downloaded(tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    write_split(tmp_path, "instances_val2017", [], [])
    assert find_split(tmp_path, "val") == tmp_path / "annotations" / "instances_val2017.json"
    assert CocoDataset(tmp_path, "val").image_folder == tmp_path / "val2017"


@pytest.mark.parametrize("split", ["test-dev", "test-dev2017", "image_info_test-dev2017"])
def test_the_test_images_of_coco_have_no_annotations(tmp_path: Path, split: str) -> None:
    write_image(tmp_path / "test2017" / "a.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    path = write_split(tmp_path, "image_info_test-dev2017", [("a.png", HEIGHT, WIDTH)], [])
    content = json.loads(path.read_text())
    del content["annotations"]
    path.write_text(json.dumps(content))
    data = CocoDataset(tmp_path, split)
    assert not data.labelled and len(data) == 1 and data.records[0].annotations == ()
    assert data.image_folder == tmp_path / "test2017" and data.classes == CLASSES


def test_polygons_are_kept_as_they_are_until_they_are_needed(tmp_path: Path) -> None:
    triangle = [[3.25, 2.5, 20.75, 4.125, 9.0, 17.5]]
    annotation = annotation_of(disc(HEIGHT, WIDTH, 8, 9, 5), 1, 3)
    data = build(tmp_path, [annotation | {"segmentation": triangle}, annotation])
    outline, stored = data.records[0].objects
    assert isinstance(outline, PolygonObject) and isinstance(stored, Annotation)
    found = data.records[0].annotations
    expected = coco_mask.merge(coco_mask.frPyObjects(triangle, HEIGHT, WIDTH))
    assert found[0].rle == expected and found[0].label == 0
    assert found[0].box_xywh == tuple(coco_mask.toBbox(expected))
    assert found[1] is stored


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": [], "annotations": []}'])
def test_a_file_that_is_not_coco(tmp_path: Path, text: str) -> None:
    build_tiny_data(tmp_path)
    (tmp_path / "annotations" / "train.json").write_text(text)
    with pytest.raises(DatasetError, match=r"train\.json"):
        CocoDataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 4}, "names image 1 and category 4"),
        ({"image_id": 9}, "names image 9 and category 3"),
        ({"segmentation": rle_of(np.ones((4, 4), np.uint8))}, r"mask of \[4, 4\].*\[20, 30\]"),
    ],
)
def test_an_annotation_that_does_not_fit(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    annotation = annotation_of(disc(HEIGHT, WIDTH, 8, 9, 5), 1, 3)
    with pytest.raises(DatasetError, match=message):
        build(tmp_path, [annotation | change])


def test_the_file_is_read_as_it_lies_there(tmp_path: Path) -> None:
    data = build(tmp_path, [])
    assert data.image_bytes(0) == (tmp_path / "images" / "a.png").read_bytes()
    assert json.loads(data.annotation_file.read_text())["images"][0]["file_name"] == "a.png"
