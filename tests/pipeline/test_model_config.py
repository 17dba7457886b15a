"""config.json: what is read and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.model_config import (
    MAX_CLASSES,
    KeepRatioResize,
    TileResize,
    parse_model_config,
)

FILES = {"model.onnx": {"sha256": "a" * 64, "bytes": 10}}


def _content(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "schema_version": 1,
        "name": "nuclei",
        "input": {"resize": {"rule": "keep_ratio", "short_side": 800, "long_side": 1333}},
        "classes": [{"category_id": 1, "name": "nucleus"}],
        "candidates": 500,
        "mask_stride": 4,
        "postprocess": {"nms": {"kind": "mask", "iou_threshold": 0.5}},
        "versions": {"1": {"files": FILES}},
    }
    return {**content, **changes}


def test_shared_sections_and_a_version_that_replaces_one() -> None:
    tiles = {"resize": {"rule": "tile", "scale": 2, "tile_hw": [256, 256], "overlap_px": 64}}
    versions = {"1": {"files": FILES}, "12": {"files": FILES, "input": tiles}}
    repository = parse_model_config(json.dumps(_content(versions=versions)))
    assert repository.version_numbers == [1, 12]
    assert isinstance(repository.for_version(1).input.resize, KeepRatioResize)
    resize = repository.for_version(12).input.resize
    assert isinstance(resize, TileResize) and resize.canvas_hw == (512, 512)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"nmae": "x"}, "nmae"),
        ({"schema_version": 2}, "schema_version"),
        ({"versions": {"one": {}}}, "one"),
        ({"versions": {"0": {}}}, "versions"),
    ],
)
def test_wrong_files_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_model_config(json.dumps(_content(**changes)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"classes": []}, "classes"),
        ({"classes": [{"category_id": 1, "name": "a"}, {"category_id": 1, "name": "b"}]}, "unique"),
        ({"candidates": 0}, "candidates"),
        ({"postprocess": {"nms": {"kind": "soft"}}}, "soft"),
        ({"postprocess": {"nms": {"kind": "mask"}, "mask_threshold": 2}}, "mask_threshold"),
        (
            {"input": {"resize": {"rule": "tile", "scale": 1, "tile_hw": [8, 8], "overlap_px": 8}}},
            "8",
        ),
        ({"input": None}, "input"),
        ({"versions": {"1": {"files": {"model.onnx": {"sha256": "xyz", "bytes": 1}}}}}, "sha256"),
    ],
)
def test_wrong_sections_are_named(changes: dict[str, Any], match: str) -> None:
    repository = parse_model_config(json.dumps(_content(**changes)))
    with pytest.raises(ConfigError, match=match):
        repository.for_version(1)


def test_the_number_of_classes_is_bounded() -> None:
    classes = [{"category_id": index, "name": "a"} for index in range(MAX_CLASSES + 1)]
    match = rf"classes: .* {MAX_CLASSES} items after validation, not {MAX_CLASSES + 1}"
    with pytest.raises(ConfigError, match=match):
        parse_model_config(json.dumps(_content(classes=classes)))
    own = {"1": {"files": FILES, "classes": classes}}
    with pytest.raises(ConfigError, match=match):
        parse_model_config(json.dumps(_content(versions=own))).for_version(1)
    most = parse_model_config(json.dumps(_content(classes=classes[:-1])))
    assert len(most.for_version(1).classes) == MAX_CLASSES


def test_missing_version_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no version 3, only \[1\]"):
        parse_model_config(json.dumps(_content())).for_version(3)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_what_is_not_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        parse_model_config(text)


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        (None, [4]),
        ({"policy": "latest"}, [4]),
        ({"policy": "latest", "count": 2}, [2, 4]),
        ({"policy": "latest", "count": 9}, [1, 2, 4]),
        ({"policy": "all"}, [1, 2, 4]),
        ({"policy": "specific", "versions": [2, 1, 2]}, [1, 2]),
    ],
)
def test_the_policy_says_which_versions_are_served(
    serve: dict[str, Any] | None, expected: list[int]
) -> None:
    content = _content(versions={"2": {}, "1": {}, "4": {}})
    if serve is not None:
        content["serve"] = serve
    repository = parse_model_config(json.dumps(content))
    assert repository.served_versions == expected


@pytest.mark.parametrize(
    "serve",
    [
        *({"policy": "newest"}, {"policy": "latest", "count": 0}),
        *({"policy": "specific", "versions": []}, {"policy": "all", "count": 1}),
    ],
)
def test_a_wrong_policy_is_refused(serve: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="serve"):
        parse_model_config(json.dumps(_content(serve=serve)))


def test_a_version_that_is_to_be_served_and_is_not_there_is_named() -> None:
    content = _content(versions={"1": {}}, serve={"policy": "specific", "versions": [1, 7]})
    with pytest.raises(ConfigError, match=r"served in \[7\], but has only \[1\]"):
        _ = parse_model_config(json.dumps(content)).served_versions
    with pytest.raises(ConfigError, match="names no version"):
        _ = parse_model_config(json.dumps(_content(versions={}))).served_versions


RESIZE = {"rule": "tile", "scale": 1, "tile_hw": [256, 256], "overlap_px": 0}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"input": {"resize": {**RESIZE, "tile_hw": [100_000, 8]}}}, r"tile_hw\.0"),
        ({"input": {"resize": {**RESIZE, "scale": 30}}}, "canvas would have 7680x7680 px"),
        ({"input": {"resize": {**RESIZE, "scale": 0.0001}}}, "canvas would have 0x0 px"),
        (
            {"input": {"resize": {"rule": "keep_ratio", "short_side": 8192, "long_side": 8192}}},
            "canvas would have 8192x8192 px",
        ),
        ({"limits": {"instances": 10**9}}, "instances"),
        ({"limits": {"threads": 10**6}}, "threads"),
        ({"limits": {"max_batch": 10**6}}, "max_batch"),
        ({"limits": {"precision": "int4"}}, r"precision: .*'int8'"),
        ({"candidates": 2**31}, "candidates"),
        ({"versions": {"1": {"files": {"m": {"sha256": "a" * 64, "bytes": 2**40}}}}}, "bytes"),
    ],
)
def test_sizes_are_bounded(changes: dict[str, Any], match: str) -> None:
    repository = parse_model_config(json.dumps(_content(**changes)))
    with pytest.raises(ConfigError, match=match):
        repository.for_version(1)


@pytest.mark.parametrize(
    "resize",
    [
        {**RESIZE, "scale": 16},
        {"rule": "keep_ratio", "short_side": 4096, "long_side": 4096},
        {"rule": "keep_ratio", "short_side": 800, "long_side": 1333},
        {"rule": "keep_ratio", "short_side": 9999, "long_side": 1333},
    ],
)
def test_the_largest_canvases_are_taken(resize: dict[str, Any]) -> None:
    repository = parse_model_config(json.dumps(_content(input={"resize": resize})))
    assert repository.for_version(1).input.resize.rule == resize["rule"]


@pytest.mark.parametrize("key", ["9" * 5000, "1" * 10, "01", "1.0", "-1", "1\n"])
def test_version_keys_have_at_most_nine_digits(key: str) -> None:
    with pytest.raises(ConfigError, match="versions") as caught:
        parse_model_config(json.dumps(_content(versions={key: {"files": FILES}})))
    assert len(str(caught.value)) < 300
    assert parse_model_config(json.dumps(_content(versions={"9" * 9: {}}))).version_numbers


def test_a_reason_names_the_first_faults_and_counts_the_others() -> None:
    text = json.dumps(_content(**{f"field_{i}": i for i in range(10_000)}))
    with pytest.raises(ConfigError, match=r"field_0: .*; and 9995 more") as caught:
        parse_model_config(text)
    assert len(str(caught.value)) < 1100


def test_a_model_may_name_its_precision() -> None:
    content = _content(limits={"precision": "int8"})
    assert parse_model_config(json.dumps(content)).for_version(1).limits.precision == "int8"
    assert parse_model_config(json.dumps(_content())).for_version(1).limits.precision is None


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "a\nb", "x" * 300])
def test_a_name_is_one_of_a_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        parse_model_config(json.dumps(_content(name=name)))


TILES = {"resize": {"rule": "tile", "scale": 2, "tile_hw": [256, 128], "overlap_px": 64}}
ALL_800 = [[800, 800], [800, 1344], [1344, 800]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"canvases": []},
        {"canvases": ALL_800},
        {"canvases": [[1344, 1344]]},
        {"input": TILES, "canvases": [[512, 256]]},
    ],
)
def test_canvases_hold_every_image(changes: dict[str, Any]) -> None:
    found = parse_model_config(json.dumps(_content(**changes))).for_version(1).canvases
    assert [list(canvas) for canvas in found] == changes.get("canvases", [])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"canvases": [[800, 1344]]}, "no canvas holds the largest image, 1344x800 px"),
        ({"canvases": [[1344, 800]]}, "no canvas holds the largest image, 800x1344 px"),
        ({"canvases": [[1312, 1344], [1344, 768]]}, "1344x800"),
        ({"canvases": [*ALL_800, [801, 1344]]}, r"canvas \(801, 1344\) is not in multiples of 32"),
        ({"canvases": [*ALL_800, [0, 32]]}, "canvases.3.0: .*greater than 0"),
        ({"canvases": [*ALL_800, [8192, 8192]]}, "the canvas would have 8192x8192 px"),
        ({"canvases": [[800, 1344, 3]]}, "canvases.0"),
        ({"canvases": [[1344, 1344]] * 17}, "canvases: .*at most 16"),
        ({"input": TILES, "canvases": [[256, 256]]}, r"canvases must be \(512, 256\) alone"),
        ({"input": TILES, "canvases": [[512, 256], [512, 512]]}, "alone, the tiles' canvas"),
    ],
)
def test_canvases_that_cannot_be_served_are_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_model_config(json.dumps(_content(**changes))).for_version(1)
