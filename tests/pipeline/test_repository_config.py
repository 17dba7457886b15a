"""config.json: what is read and what is refused, and which versions are served."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.model_config import KeepRatioResize, TileResize
from pipeline.repository_config import parse_model_config
from tests.support.config_content import FILES, config_content


def test_shared_sections_and_a_version_that_replaces_one() -> None:
    tiles = {"resize": {"rule": "tile", "scale": 2, "tile_hw": [256, 256], "overlap_px": 64}}
    versions = {"1": {"files": FILES}, "12": {"files": FILES, "input": tiles}}
    repository = parse_model_config(json.dumps(config_content(versions=versions)))
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
        parse_model_config(json.dumps(config_content(**changes)))


def test_missing_version_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no version 3, only \[1\]"):
        parse_model_config(json.dumps(config_content())).for_version(3)


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
    content = config_content(versions={"2": {}, "1": {}, "4": {}})
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
        parse_model_config(json.dumps(config_content(serve=serve)))


def test_a_version_that_is_to_be_served_and_is_not_there_is_named() -> None:
    content = config_content(versions={"1": {}}, serve={"policy": "specific", "versions": [1, 7]})
    with pytest.raises(ConfigError, match=r"served in \[7\], but has only \[1\]"):
        _ = parse_model_config(json.dumps(content)).served_versions
    with pytest.raises(ConfigError, match="names no version"):
        _ = parse_model_config(json.dumps(config_content(versions={}))).served_versions


@pytest.mark.parametrize("key", ["9" * 5000, "1" * 10, "01", "1.0", "-1", "1\n"])
def test_version_keys_have_at_most_nine_digits(key: str) -> None:
    with pytest.raises(ConfigError, match="versions") as caught:
        parse_model_config(json.dumps(config_content(versions={key: {"files": FILES}})))
    assert len(str(caught.value)) < 300
    assert parse_model_config(json.dumps(config_content(versions={"9" * 9: {}}))).version_numbers


def test_a_reason_names_the_first_faults_and_counts_the_others() -> None:
    text = json.dumps(config_content(**{f"field_{i}": i for i in range(10_000)}))
    with pytest.raises(ConfigError, match=r"field_0: .*; and 9995 more") as caught:
        parse_model_config(text)
    assert len(str(caught.value)) < 1100


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "a\nb", "x" * 300])
def test_a_name_is_one_of_a_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        parse_model_config(json.dumps(config_content(name=name)))
