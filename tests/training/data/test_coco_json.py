from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data.coco import compact_row
from training.data.coco_json import read_coco_json
from training.data.records import DatasetError

FIELDS = ("annotations", "images", "categories")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "a.json"
    path.write_text(text)
    return path


def annotation(**changes: Any) -> dict[str, Any]:
    return {
        "id": 5,
        "image_id": 1,
        "category_id": 2,
        "segmentation": [[0, 0, 4, 0, 4, 3]],
        **changes,
    }


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.dictionaries(st.text().filter(lambda k: k not in FIELDS), JSON, max_size=4),
    indent=st.sampled_from([None, 0, 3]),
    place=st.integers(0, 4),
    count=st.integers(0, 3),
)
def test_everything_but_the_annotations_is_as_json_reads_it(
    tmp_path: Path, content: dict[str, Any], indent: int | None, place: int, count: int
) -> None:
    items = [*content.items(), ("images", [content]), ("categories", [])]
    items.insert(place, ("annotations", [annotation(id=i) for i in range(count)]))
    path = write(tmp_path, json.dumps(dict(items), indent=indent))
    found = read_coco_json(path, tmp_path)
    assert found.images == [content] and found.categories == []
    assert found.image_folder == tmp_path and found.source == str(path)
    for _ in range(2):
        assert found.annotations is not None
        assert [row["id"] for row in found.annotations] == list(range(count))


def test_what_is_kept_of_an_annotation() -> None:
    rle = {"size": [3, 4], "counts": "abc"}
    items = [
        annotation(
            segmentation=[[0.25, 0, 4, 0, 4, 3.5], [1, 1, 2, 1, 2, 2]], area=7, bbox=[0] * 4
        ),
        annotation(segmentation=rle),
        annotation(segmentation=rle, iscrowd=1),
        annotation(segmentation=[]),
    ]
    rows = [compact_row(item) for item in items]
    outline = rows[0].segmentation
    assert isinstance(outline, tuple)
    np.testing.assert_array_equal(outline[0], [0.25, 0, 4, 0, 4, 3.5])
    np.testing.assert_array_equal(outline[1], [1, 1, 2, 1, 2, 2])
    assert [row.segmentation for row in rows[1:]] == [rle, None, None]
    assert {(row.id, row.image_id, row.category_id) for row in rows} == {(5, 1, 2)}


def test_a_file_of_test_images_has_no_annotations(tmp_path: Path) -> None:
    path = write(tmp_path, '{"images": [], "categories": []}')
    assert read_coco_json(path, tmp_path).annotations is None


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff{"images": [3], "categories": []}')
    assert read_coco_json(path, tmp_path).image_folder == tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        "{",
        '{"images"',
        '{"images": ',
        '{"images": [], ',
        '{"images": [] "x": 1}',
        '{"annotations": [',
        '{"annotations": [{}',
        '{"annotations": 3}',
        '{"annotations": null}',
        '{"annotations": [] []}',
    ],
)
def test_what_is_no_json_of_this_kind_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DatasetError, match=r"a\.json is not COCO JSON"):
        read_coco_json(write(tmp_path, text), tmp_path)


@pytest.mark.parametrize("part", [[], [1, 2], [1, 2, 3, 4, 5], "abcd", 7, {"x": 1}])
def test_a_polygon_that_is_none_is_named(part: Any) -> None:
    with pytest.raises(ValueError, match="annotation 5 has a polygon of"):
        compact_row(annotation(segmentation=[part]))
