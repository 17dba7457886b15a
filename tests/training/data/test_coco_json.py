from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data import coco_json
from training.data.coco_json import read_coco_json
from training.data.content import CocoContent
from training.data.records import DatasetError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read(folder: Path, text: str) -> CocoContent:
    path = folder / "a.json"
    path.write_text(text)
    return read_coco_json(path, folder)


def read_all(folder: Path, text: str) -> None:
    """Reads the annotations, too."""
    list(read(folder, text).annotations or ())


JSON_SAMPLE: Any = {"id": [1, {"a": None}], "\u00e4": "]},"}


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
    content=st.dictionaries(st.text().filter(lambda k: k != "annotations"), JSON, max_size=4),
    indent=st.sampled_from([None, 0, 3]),
    place=st.integers(0, 4),
    count=st.integers(0, 3),
)
def test_the_content_is_as_json_reads_it(
    tmp_path: Path, content: dict[str, Any], indent: int | None, place: int, count: int
) -> None:
    items = [(k, v) for k, v in content.items() if k not in ("images", "categories")]
    items += [("images", [JSON_SAMPLE]), ("categories", JSON_SAMPLE)]
    items.insert(place, ("annotations", [annotation(id=i) for i in range(count)]))
    found = read(tmp_path, json.dumps(dict(items), indent=indent))
    assert found.images == [JSON_SAMPLE] and found.categories == JSON_SAMPLE
    assert found.source == str(tmp_path / "a.json") and found.image_folder == tmp_path
    assert found.annotations is not None
    assert [a["id"] for a in found.annotations] == list(range(count))


def test_annotations_are_parsed_anew_each_time(tmp_path: Path) -> None:
    items = [annotation(segmentation=[[0.25, 0, 4, 0, 4, 3.5]], area=7), annotation(id=6)]
    found = read(tmp_path, json.dumps({"annotations": items, "images": [], "categories": []}))
    assert found.annotations is not None
    assert list(found.annotations) == items
    assert list(found.annotations) == items


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_byte_order_mark_and_wide_characters(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('{"images": [], "categories": [{"id": "\u00e4"}]}'.encode(encoding))
    assert read_coco_json(path, tmp_path).categories == [{"id": "\u00e4"}]


def test_endless_nesting_in_an_annotation_is_an_error(tmp_path: Path) -> None:
    text = '{"images": [], "categories": [], "annotations": [' + "[" * 100_000
    with pytest.raises(DatasetError, match=r"a\.json"):
        read_all(tmp_path, text)


def test_a_file_of_test_images_has_no_annotations(tmp_path: Path) -> None:
    assert read(tmp_path, '{"images": [], "categories": []}').annotations is None


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
        '{"images": [], "categories": [], "annotations": []} x',
        '{"images": [], "annotations": []}',
        '{"images": [], "categories": [], "annotations": [{}',
        '{"images": [], "categories": [], "annotations": [{} {}]}',
        '{"images": [], "categories": [], "annotations": 3}',
        '{"images": [], "categories": [], "annotations": [], "annotations": []}',
        '{"images": [], "annotations": [}, "categories": []}',
        '{"annotations": [], "x": {"images": [], "categories": []}',
        '{"annotations": [{"images": [], "categories": []}',
    ],
)
def test_what_is_no_json_of_this_kind_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DatasetError, match=r"a\.json"):
        read_all(tmp_path, text)


LISTS: dict[str, Any] = {"images": [{"id": 1}], "categories": [{"name": "x"}], "info": {}}


@pytest.mark.parametrize("keys", itertools.permutations(["annotations", *LISTS]))
def test_annotations_are_parsed_once_wherever_they_are(
    tmp_path: Path, keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [annotation(id=i) for i in range(20)]
    content = {key: LISTS.get(key, items) for key in keys}
    parsed: list[Any] = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
            value, end = super().raw_decode(s, idx)
            parsed.append(value)
            return value, end

    monkeypatch.setattr(coco_json, "_DECODER", Counting())
    found = read(tmp_path, json.dumps(content))
    assert found.images == LISTS["images"] and found.categories == LISTS["categories"]
    assert found.annotations is not None and list(found.annotations) == items
    assert [value for value in parsed if value in items] == items


@pytest.mark.parametrize(
    "name", ['categories": []}', '"categories": []}', '], "images": [], "categories": []}', "\\"]
)
@pytest.mark.parametrize("first", ["images", "annotations", "categories", "zzz"])
def test_names_that_look_like_fields_are_not_taken_for_them(
    tmp_path: Path, name: str, first: str
) -> None:
    content: dict[str, Any] = {
        "annotations": [annotation(categories=[], images={"categories": name})],
        "images": [{"id": 1, "file_name": name}],
        "categories": [{"id": 1, "name": name}],
        "zzz": {"images": [], "categories": [], name: name},
    }
    for key in (first, "annotations", "images"):
        content[key] = content.pop(key)  # the last one is last in the file
        found = read(tmp_path, json.dumps(content))
        assert (found.images, found.categories) == (content["images"], content["categories"])
        assert found.annotations is not None
        assert list(found.annotations) == content["annotations"]
