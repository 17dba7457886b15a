"""What a version changes in config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.config_json import merge_config, read_repository
from export.errors import PublishError
from export.publish import Artefact, add_artefacts, publish
from tests.support.releases import GRAPH, OTHER, PASSED, build_release, files_under, read_config


def test_a_second_version_does_not_change_the_first(tmp_path: Path) -> None:
    first, second = build_release(1), build_release(2, OTHER, candidates=7, mask_stride=8)
    publish(tmp_path, first)
    publish(tmp_path, second)
    repository = read_repository(tmp_path / "blobs")
    assert repository is not None
    assert repository.for_version(1) == first.config
    assert repository.for_version(2) == second.config
    config = read_config(tmp_path)
    assert config["candidates"] == 7
    assert set(config["versions"]["1"]) == {"candidates", "mask_stride", "files", "provenance"}
    assert set(config["versions"]["2"]) == {"files", "provenance"}
    assert (tmp_path / "blobs" / "1" / "model.onnx").read_bytes() == GRAPH


def test_versions_with_sections_of_their_own_stay_valid(tmp_path: Path) -> None:
    """A hand-written config.json without shared sections."""
    folder = tmp_path / "blobs"
    publish(tmp_path, build_release(3))
    config = read_config(tmp_path)
    entry = config["versions"]["3"]
    for section in ("input", "classes", "candidates", "mask_stride", "postprocess", "limits"):
        entry[section] = config.pop(section)
    (folder / "config.json").write_text(json.dumps(config))
    before = read_repository(folder)
    publish(tmp_path, build_release(1, limits={"max_batch": 2}))
    after = read_repository(folder)
    assert before is not None and after is not None
    assert after.version_numbers == [1, 3]
    assert after.for_version(3) == before.for_version(3)
    assert after.for_version(1).limits.max_batch == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"name": "blobs", "versions": {}, "colour": 1}', "colour"),
        ('{"name": "discs", "versions": {}}', "belongs to the model 'discs'"),
        ('{"name": "blobs", "versions": {"4": {}}}', "version 4"),
    ],
)
def test_a_config_that_cannot_be_extended_is_rejected(
    tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "config.json").write_text(text)
    with pytest.raises(PublishError, match=reason):
        publish(tmp_path, build_release())
    assert list(files_under(tmp_path)) == ["blobs/config.json"]


def test_shared_sections_are_written_once() -> None:
    config = merge_config(None, build_release(1).config)
    assert list(config) == [
        "schema_version",
        "name",
        "task",
        "description",
        "input",
        "card",
        "classes",
        "candidates",
        "mask_stride",
        "postprocess",
        "limits",
        "canvases",
        "versions",
    ]


def test_the_version_policy_is_kept(tmp_path: Path) -> None:
    publish(tmp_path, build_release(1))
    file = tmp_path / "blobs" / "config.json"
    content = read_config(tmp_path)
    assert "serve" not in content
    file.write_text(json.dumps({**content, "serve": {"policy": "latest", "count": 2}}))
    target = publish(tmp_path, build_release(2))
    assert read_config(tmp_path)["serve"] == {"policy": "latest", "count": 2}
    add_artefacts(target.parent, 2, [Artefact("model.fp16.onnx", GRAPH, PASSED)])
    assert read_config(tmp_path)["serve"] == {"policy": "latest", "count": 2}
    repository = read_repository(tmp_path / "blobs")
    assert repository is not None and repository.served_versions == [1, 2]
