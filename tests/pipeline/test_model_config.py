"""The sections of a version: what is taken and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.model_config import MAX_CLASSES
from pipeline.repository_config import parse_model_config
from tests.support.config_content import FILES, config_content


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
    repository = parse_model_config(json.dumps(config_content(**changes)))
    with pytest.raises(ConfigError, match=match):
        repository.for_version(1)


def test_the_number_of_classes_is_bounded() -> None:
    classes = [{"category_id": index, "name": "a"} for index in range(MAX_CLASSES + 1)]
    match = rf"classes: .* {MAX_CLASSES} items after validation, not {MAX_CLASSES + 1}"
    with pytest.raises(ConfigError, match=match):
        parse_model_config(json.dumps(config_content(classes=classes)))
    own = {"1": {"files": FILES, "classes": classes}}
    with pytest.raises(ConfigError, match=match):
        parse_model_config(json.dumps(config_content(versions=own))).for_version(1)
    most = parse_model_config(json.dumps(config_content(classes=classes[:-1])))
    assert len(most.for_version(1).classes) == MAX_CLASSES


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
    repository = parse_model_config(json.dumps(config_content(**changes)))
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
    repository = parse_model_config(json.dumps(config_content(input={"resize": resize})))
    assert repository.for_version(1).input.resize.rule == resize["rule"]


def test_a_model_may_name_its_precision() -> None:
    content = config_content(limits={"precision": "int8"})
    assert parse_model_config(json.dumps(content)).for_version(1).limits.precision == "int8"
    assert parse_model_config(json.dumps(config_content())).for_version(1).limits.precision is None


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
    found = parse_model_config(json.dumps(config_content(**changes))).for_version(1).canvases
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
        parse_model_config(json.dumps(config_content(**changes))).for_version(1)
