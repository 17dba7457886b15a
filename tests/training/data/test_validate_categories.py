"""Which categories are kept, skipped and refused, and which of two splits agree."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.model_config import ClassSpec
from tests.support.checked_data import CATEGORY, annotation, check, kinds
from training.data.records import DatasetError
from training.data.report import Kind
from training.data.validate import check_classes


@pytest.mark.parametrize(("other", "alike"), [("Disc ", True), ("DISC", True), ("disk", False)])
def test_classes_that_may_be_one_are_named(other: str, alike: bool) -> None:
    categories = [CATEGORY, {"id": 4, "name": other}]
    report = check(annotation(), annotation(id=2, category_id=4), categories=categories).report
    assert report.classes == {"disc": 1, other: 1}
    line = f"classes that differ only in case or spaces: 'disc', {other!r}"
    assert (f"train.json: {line}" in report.warnings()) == alike
    assert (f"warning: {line}" in report.text()) == alike


GROUP = {"id": 0, "name": "disc", "supercategory": "none"}


MEMBER = {**CATEGORY, "supercategory": "disc"}


@pytest.mark.parametrize(
    ("categories", "dropped"),
    [
        ([GROUP, MEMBER], "id 0, 'disc'"),
        ([MEMBER, {**GROUP, "supercategory": None}], "id 0, 'disc'"),
        ([CATEGORY, {"id": 7, "name": "disc"}], "id 7, 'disc'"),
        ([{"id": 7, "name": "disc"}, CATEGORY], "id 7, 'disc'"),
        ([{**GROUP, "name": "shapes"}, {**MEMBER, "supercategory": "shapes"}], "id 0, 'shapes'"),
    ],
)
def test_a_category_that_only_repeats_or_groups_others_is_skipped(
    categories: Any, dropped: str
) -> None:
    checked = check(annotation(), categories=categories)
    assert checked.classes == (ClassSpec(category_id=3, name="disc"),)
    assert kinds(checked) == {Kind.CATEGORY_UNUSED} and checked.report.refusal is None
    assert dropped in checked.report.warnings()[0]
    (record,) = checked.records
    assert [item.label for item in record.objects] == [0]


def test_without_objects_the_member_of_a_group_is_kept() -> None:
    names = [{"id": 5, "name": "a"}, {"id": 6, "name": "a"}]
    classes = check(categories=[GROUP, MEMBER, *names]).classes
    assert [c.category_id for c in classes] == [3, 5]


@pytest.mark.parametrize("parent", ["disc", "none", None, ["disc"], 4])
def test_an_unused_class_that_groups_nothing_is_kept(parent: Any) -> None:
    categories = [CATEGORY, {"id": 4, "name": "ring", "supercategory": parent}]
    checked = check(annotation(), categories=categories)
    assert [c.name for c in checked.classes] == ["disc", "ring"] and not kinds(checked)


def test_categories_of_one_name_that_both_have_objects_are_refused_with_their_numbers() -> None:
    objects = [annotation(), annotation(id=2), annotation(id=9, category_id=0)]
    refusal = check(*objects, categories=[GROUP, MEMBER]).report.refusal
    assert refusal and "'disc': the ids 0 (1 annotations) and 3 (2)" in refusal


def test_of_three_categories_of_one_name_two_are_named() -> None:
    objects = [annotation(id=n, category_id=n) for n in (3, 5, 7)]
    categories = [{"id": n, "name": "disc"} for n in (3, 5, 7)]
    refusal = check(*objects, categories=categories).report.refusal
    assert refusal and "'disc': the ids 3 (1 annotations) and 5 (1)" in refusal


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([], "categories: the list is []"),
        ([{"id": 3}], "no valid id and name: {'id': 3}"),
        ([{"id": 3, "name": ""}], "no valid id and name"),
        ([{"id": 3, "name": 7}], "no valid id and name"),
        ([{"id": -1, "name": "a"}], "-1"),
        ([{"id": True, "name": "a"}], "True"),
        ([CATEGORY, {"id": 3, "name": "b"}], "two categories have the id 3: 'disc' and 'b'"),
        ([CATEGORY, {"id": "3", "name": "b"}], "two categories have the id 3"),
    ],
)
def test_wrong_categories_are_refused(categories: Any, message: str) -> None:
    checked = check(annotation(), annotation(category_id=9), categories=categories)
    assert message in str(checked.report.refusal)
    assert not checked.report.count(Kind.REFERENCE)  # what follows from it is not listed


def known(*classes: tuple[int, str]) -> tuple[ClassSpec, ...]:
    return tuple(ClassSpec(category_id=i, name=name) for i, name in classes)


@pytest.mark.parametrize("classes", [[(3, "disc")], [(1, "a"), (3, "disc")]])
def test_classes_that_agree(classes: list[tuple[int, str]]) -> None:
    check_classes(check(annotation()), known(*classes), "the model")


def test_a_class_without_objects_may_be_unknown() -> None:
    split = check(annotation(), categories=[CATEGORY, {"id": 7, "name": "box"}])
    check_classes(split, known((3, "disc")), "the model")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([(3, "box")], "category 3 is 'disc', the model calls it 'box'"),
        ([(1, "disc")], "category 3 is 'disc', the model has no such id"),
        ([], "has no such id"),
    ],
)
def test_classes_that_differ_are_refused(classes: list[tuple[int, str]], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        check_classes(check(annotation()), known(*classes), "the model")
