from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.support.checked_data import (
    CATEGORY,
    HEIGHT,
    IMAGE,
    MASK,
    WIDTH,
    annotation,
    check,
    kinds,
)
from tests.support.tiny import rle_of
from training.data.content import CocoContent
from training.data.report import Kind
from training.data.validate import check_content

TRIANGLE = [2, 2, 20, 4, 9, 17]


def test_a_data_set_without_faults_has_no_findings() -> None:
    checked = check(annotation(), annotation(id=2, iscrowd=1), size=(HEIGHT, WIDTH))
    assert not kinds(checked) and checked.report.refusal is None
    assert not checked.report.warnings()
    (record,) = checked.records
    assert len(record.objects) == len(record.crowds) == 1
    assert "1 images, 1 objects, 1 crowds, 1 classes (disc 1)" in checked.report.text()


@pytest.mark.parametrize(
    ("segmentation", "kind"),
    [
        (None, Kind.NO_SEGMENTATION),
        ([], Kind.NO_SEGMENTATION),
        ({}, Kind.NO_SEGMENTATION),
        ([[]], Kind.FEW_POINTS),
        ([[1, 2, 3, 4]], Kind.FEW_POINTS),
        ([[1, 2], [], [1, 2, 3, 4]], Kind.FEW_POINTS),
        ([[40, 2, 50, 2, 45, 9]], Kind.OUTSIDE),
        ([[-9, 2, -3, 2, 0, 9]], Kind.OUTSIDE),
        ([[5, 20, 9, 20, 5, 40]], Kind.OUTSIDE),
        ([[5, 5, 5, 5, 5, 5]], Kind.NO_PIXELS),
        ([[5, 5, 9, 5, 7, 5]], Kind.NO_PIXELS),
        ({"size": [HEIGHT, WIDTH], "counts": []}, Kind.NO_PIXELS),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, Kind.NO_PIXELS),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, Kind.NO_PIXELS),
        (rle_of(np.zeros((HEIGHT, WIDTH), np.uint8)), Kind.NO_PIXELS),
    ],
)
def test_an_object_that_cannot_be_used_is_skipped_and_counted(
    segmentation: Any, kind: Kind
) -> None:
    bad = [annotation(segmentation=segmentation, id=50 + i) for i in range(5)]
    checked = check(annotation(), *bad)
    assert kinds(checked) == {kind} and kind.action == "skipped"
    assert checked.report.count(kind) == 5 and checked.report.refusal is None
    assert len(checked.records[0].objects) == 1
    (warning,) = checked.report.warnings()
    assert "train.json: skipped 5 objects" in warning
    assert "annotation 50 of image 1 ('a.png')" in warning and "annotation 52" in warning
    assert "annotation 53" not in warning and warning.endswith("...")


@pytest.mark.parametrize(
    ("segmentation", "kind", "value"),
    [
        ("abc", Kind.SEGMENTATION, "'abc'"),
        (7, Kind.SEGMENTATION, "7"),
        ([1, 2, 3, 4, 5, 6], Kind.SEGMENTATION, "is 1,"),
        (["abcdef"], Kind.SEGMENTATION, "'abcdef'"),
        ([[1, 2, 3, 4, 5]], Kind.SEGMENTATION, "[1, 2, 3, 4, 5]"),
        ([[[1, 2], [3, 4], [5, 6], [7, 8]]], Kind.SEGMENTATION, "[[1, 2]"),
        ([[1, 2, 3, 4, 5, "x"]], Kind.SEGMENTATION, "'x'"),
        ([[1, 2, 3, 4, 5, [6]]], Kind.SEGMENTATION, "[6]"),
        ([[1, 2, 3, 4, 5, None]], Kind.COORDINATE, "None"),
        ([[1, 2, 3, 4, 5, 10**400]], Kind.SEGMENTATION, "10000"),
        ([TRIANGLE, [1, float("nan")]], Kind.COORDINATE, "nan"),
        ([[0, 0, 1e9, 0, 0, 9]], Kind.COORDINATE, "1000000000"),
        ([[0, 0, 500, 20] * 4000], Kind.COORDINATE, "px long"),
        ({"counts": "abc"}, Kind.RLE, "a mask of None"),
        ({"size": [WIDTH, HEIGHT], "counts": "abc"}, Kind.RLE, "[30, 20]"),
        ({"size": "ab", "counts": "abc"}, Kind.RLE, "'ab'"),
        ({"size": [HEIGHT, WIDTH]}, Kind.RLE, "None"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 7]}, Kind.RLE, "give 12 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [-5, 605]}, Kind.RLE, "-5"),
        ({"size": [HEIGHT, WIDTH], "counts": [0.5, 599.5]}, Kind.RLE, "0.5"),
        ({"size": [HEIGHT, WIDTH], "counts": [float("nan"), 600]}, Kind.RLE, "nan"),
        ({"size": [HEIGHT, WIDTH], "counts": [10**400]}, Kind.RLE, "1000"),
        ({"size": [HEIGHT, WIDTH], "counts": [[600]]}, Kind.RLE, "[[600]]"),
        ({"size": [HEIGHT, WIDTH], "counts": "b'abc'"}, Kind.RLE, "b'abc'"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 10**6}, Kind.RLE, "ooo"),
        ({"size": [HEIGHT, WIDTH], "counts": {"a": 1}}, Kind.RLE, "{'a': 1}"),
    ],
)
def test_a_segmentation_that_contradicts_itself_is_refused_with_its_value(
    segmentation: Any, kind: Kind, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.data.segmentations._LONGEST_PX", 100_000)
    checked = check(annotation(), annotation(segmentation=segmentation, id=8))
    assert kinds(checked) == {kind} and kind.action == "refused"
    refusal = checked.report.refusal
    assert refusal is not None and len(refusal) < 300 and "\n" not in refusal
    assert refusal.startswith("train.json: annotation 8 of image 1 ('a.png'): ")
    assert value in refusal


def test_runs_without_pixels_do_not_change_the_mask_or_its_box() -> None:
    flat = MASK.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.r_[0, edges, flat.size]).tolist()
    split = [counts[0], 0, 0, *counts[1:3], 0, 0, counts[3] - 1, 0, 1, *counts[4:], 0, 0, 0]
    size = [HEIGHT, WIDTH]
    checked = check(annotation(segmentation={"size": size, "counts": split}))
    (found,) = checked.records[0].annotations
    assert coco_mask.decode(found.rle).tolist() == MASK.tolist()
    assert found.box_xywh == tuple(annotation()["bbox"]) and found.mask_area == MASK.sum()


def test_a_short_part_is_left_out() -> None:
    checked = check(annotation(segmentation=[[1, 2, 3, 4], TRIANGLE]))
    alone = check(annotation(segmentation=[TRIANGLE]))
    assert kinds(checked) == {Kind.PART} and not kinds(alone)
    assert checked.records[0].annotations == alone.records[0].annotations


@pytest.mark.parametrize(
    ("missing", "kind"),
    [
        ("area", Kind.NO_AREA),
        ("iscrowd", Kind.NO_CROWD_FLAG),
        ("id", Kind.ANNOTATION_ID),
        ("bbox", None),
    ],
)
def test_fields_of_annotations_that_are_not_needed(missing: str, kind: Kind | None) -> None:
    entry = annotation()
    del entry[missing]
    checked = check(entry)
    assert kinds(checked) == ({kind} if kind else set())
    assert len(checked.records[0].objects) == 1 and not checked.report.warnings()


def test_ids_0_and_doubled_ids_of_annotations() -> None:
    checked = check(annotation(id=0), annotation(id=5), annotation(id=5), annotation(id=[5]))
    assert checked.report.count(Kind.ANNOTATION_ID) == 3
    assert len(checked.records[0].objects) == 4


@pytest.mark.parametrize("area", [None, "x", -1, float("nan"), float("inf"), True, 2**62, 10**400])
def test_an_area_that_is_none_is_that_of_the_mask(area: Any) -> None:
    checked = check(annotation(area=area))
    assert kinds(checked) == {Kind.NO_AREA}
    assert checked.records[0].objects[0].area is None


@pytest.mark.parametrize("area", [0, 0.5, 2**61])
def test_an_area_that_is_stated_is_kept(area: float) -> None:
    checked = check(annotation(area=area))
    assert checked.records[0].objects[0].area == area and not kinds(checked)


@pytest.mark.parametrize(
    ("value", "crowd"), [(0, 0), ("0", 0), (None, 0), (False, 0), (1, 1), ("1", 1), (True, 1)]
)
def test_crowds(value: Any, crowd: int) -> None:
    for segmentation in (rle_of(MASK), [TRIANGLE]):
        (record,) = check(annotation(iscrowd=value, segmentation=segmentation)).records
        assert (len(record.objects), len(record.crowds)) == (1 - crowd, crowd)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iscrowd": 2}, "iscrowd is 2"),
        ({"iscrowd": []}, "iscrowd is []"),
        ({"image_id": 9}, "names image 9 and category 3; the image is not listed"),
        ({"image_id": None}, "names image None"),
        ({"image_id": [1]}, r"names image [1]"),
        ({"category_id": 4}, "names image 1 and category 4; the category is not listed"),
        ({"category_id": None}, "category None"),
        ({"category_id": {}}, "category {}"),
    ],
)
def test_a_wrong_field_of_an_annotation_is_refused(changes: dict[str, Any], message: str) -> None:
    refusal = check(annotation(**changes)).report.refusal
    assert refusal is not None and "annotation 4711" in refusal and message in refusal


@pytest.mark.parametrize("entry", [None, 5, "a", [], [1]])
def test_an_entry_that_is_no_object_is_refused(entry: Any) -> None:
    assert "annotations[0]: it is" in str(check(entry).report.refusal)
    assert "images[1]" in str(check(images=[IMAGE, entry]).report.refusal)
    assert "categories[1]" in str(check(categories=[CATEGORY, entry]).report.refusal)


@pytest.mark.parametrize("value", [None, {}, 5, "abc"])
def test_a_list_that_is_none_is_refused(value: Any) -> None:
    for name in ("images", "categories"):
        content = {"images": [IMAGE], "categories": [CATEGORY], name: value}
        checked = check_content(CocoContent("a", Path(), annotations=[], **content), None)
        assert name in str(checked.report.refusal)


@pytest.mark.parametrize("value", ["1", " 1", 1.0])
def test_ids_that_are_text_are_read(value: Any) -> None:
    checked = check(annotation(), annotation(id=2, image_id=value), images=[{**IMAGE, "id": value}])
    assert kinds(checked) == {Kind.TEXT_ID}
    assert checked.records[0].image_id == 1 and len(checked.records[0].objects) == 2
    assert check(annotation(image_id=value)).records[0].objects
    categories = [{"id": str(CATEGORY["id"]), "name": "disc"}]
    assert check(annotation(), categories=categories).classes[0].category_id == 3


def test_an_id_may_be_any_text() -> None:
    checked = check(annotation(image_id="a-7"), images=[{**IMAGE, "id": "a-7"}])
    assert checked.records[0].image_id == "a-7" and checked.report.refusal is None


@pytest.mark.parametrize("second", [1, "1", 1.0])
def test_doubled_image_ids_are_refused(second: Any) -> None:
    checked = check(annotation(), images=[IMAGE, {**IMAGE, "id": second, "file_name": "b.png"}])
    assert "two images have the id 1: 'a.png' and 'b.png'" in str(checked.report.refusal)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": None}, "images[0]"),
        ({"id": True}, "images[0]"),
        ({"id": ""}, "images[0]"),
        ({"id": 1.5}, "images[0]"),
        ({"id": 10**30}, "images[0]"),
        ({"file_name": ""}, "images[0]"),
        ({"file_name": 7}, "images[0]"),
        ({"height": -5}, "height and width are -5 and 30"),
        ({"height": 0}, "height and width are 0 and 30"),
        ({"width": 1e999}, "height and width are 20 and inf"),
        ({"width": "wide"}, "'wide'"),
        ({"width": 10**12}, "1000000000000"),
        ({"height": None, "width": None}, "no height and width"),
    ],
)
def test_a_wrong_field_of_an_image_is_refused(changes: dict[str, Any], message: str) -> None:
    checked = check(annotation(), images=[{**IMAGE, **changes}])
    assert message in str(checked.report.refusal)


def test_files_that_differ_from_the_annotations_are_refused() -> None:
    turned = check(annotation(), size=(WIDTH, HEIGHT))
    assert "image 1 ('a.png'): the file is 20x30 px, its annotation says 30x20" in str(
        turned.report.refusal
    )
    missing = check(annotation(), size="the file a.png is missing")
    assert "image 1 ('a.png'): the file a.png is missing" in str(missing.report.refusal)
    assert not missing.records and kinds(missing) == {Kind.FILE}


@pytest.mark.parametrize("stated", [{}, {"height": None, "width": None}, {"height": 0, "width": 0}])
def test_an_image_without_a_size_has_that_of_its_file(stated: dict[str, Any]) -> None:
    image = {"id": 1, "file_name": "a.png", **stated}
    checked = check(annotation(), images=[image], size=(HEIGHT, WIDTH))
    assert kinds(checked) == {Kind.NO_SIZE}
    assert (checked.records[0].height, checked.records[0].width) == (HEIGHT, WIDTH)


def test_no_objects_at_all_are_a_warning() -> None:
    (warning,) = check().report.warnings()
    assert warning == "train.json: no image has an object"
    assert "no image has an object" in check().report.text()
    assert len(check().records) == 1


def test_test_images_have_no_warning() -> None:
    content = CocoContent("test.json", Path(), [IMAGE], [CATEGORY], None)
    checked = check_content(content, None)
    assert not checked.report.labelled and not checked.report.warnings()


def test_all_faults_are_counted_and_the_first_is_named() -> None:
    bad = [annotation(id=i, segmentation="x") for i in range(1, 8)]
    checked = check(*bad, annotation(id=9, segmentation=[[]]))
    assert checked.report.count("refused") == 7
    assert "annotation 1 " in str(checked.report.refusal)
    assert "and 6 more" in str(checked.report.refusal)
    text = checked.report.text()
    assert "refused 7 segmentations" in text and "skipped 1 objects" in text
