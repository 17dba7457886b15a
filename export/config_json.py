"""config.json of a model folder: reading it, and writing the entries of versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from export.errors import PublishError
from pipeline.errors import ConfigError
from pipeline.model_config import ModelConfig
from pipeline.repository_config import SCHEMA_VERSION, RepositoryConfig, parse_model_config
from service.models.repository import CONFIG_FILE, read_repository_config

SECTIONS = (
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
)
"""Sections that versions can share at the top level of config.json, in its order."""


def describe_file(data: bytes) -> dict[str, Any]:
    """A file's entry in config.json."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def read_repository(folder: Path) -> RepositoryConfig | None:
    """Reads config.json of a model folder; None if it does not exist.

    Raises:
        PublishError: It is invalid, or belongs to another model.
    """
    file = folder / CONFIG_FILE
    try:
        repository = read_repository_config(folder)
    except FileNotFoundError:
        return None
    except (OSError, ConfigError) as error:
        raise PublishError(f"{file} cannot be extended: {error}") from error
    if repository.name != folder.name:
        raise PublishError(f"{file} belongs to the model {repository.name!r}")
    return repository


def merge_config(repository: RepositoryConfig | None, new: ModelConfig) -> dict[str, Any]:
    """config.json with a version added or replaced.

    The new version's sections become the shared ones. Other versions with different sections get
    their own in their entries, so their meaning does not change.

    Raises:
        PublishError: An existing version is invalid.
    """
    shared = _sections(new)
    versions: dict[int, dict[str, Any]] = {}
    for number in repository.version_numbers if repository else []:
        if repository is None or number == new.version:
            continue
        try:
            old = repository.for_version(number)
        except ConfigError as error:
            raise PublishError(f"config.json cannot be extended: {error}") from error
        versions[number] = _entry(old, shared)
    versions[new.version] = _entry(new, shared)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": new.name,
        **shared,
        **_policy(repository),
        "versions": {str(number): versions[number] for number in sorted(versions)},
    }


def add_version(folder: Path, version: ModelConfig) -> dict[str, Any]:
    """config.json of a model folder, which may not exist yet, with a version added or replaced.

    Raises:
        PublishError: As `read_repository` and `merge_config`.
    """
    repository = read_repository(folder)
    config = merge_config(repository, version)
    _check_unchanged(repository, config, version)
    return config


def _policy(repository: RepositoryConfig | None) -> dict[str, Any]:
    """The `serve` section, if config.json has one."""
    if repository is None or "serve" not in repository.model_fields_set:
        return {}
    return {"serve": repository.serve.model_dump(mode="json")}


def _sections(config: ModelConfig) -> dict[str, Any]:
    content = config.model_dump(mode="json")
    return {section: content[section] for section in SECTIONS}


def _entry(config: ModelConfig, shared: dict[str, Any]) -> dict[str, Any]:
    content = config.model_dump(mode="json")
    differing = {s: content[s] for s in SECTIONS if content[s] != shared[s]}
    return {**differing, **_measured(config), "provenance": content["provenance"]}


def _measured(config: ModelConfig) -> dict[str, Any]:
    """A version's `files`, and what was measured of it."""
    measured = {"files", "ap_cost", "calibration", "domain"}
    content = config.model_dump(mode="json", include=measured)
    return {name: value for name, value in content.items() if name == "files" or value}


def read_version(folder: Path, version: int) -> ModelConfig:
    """The configuration of a published version.

    Raises:
        PublishError: It does not exist or is invalid.
    """
    repository = read_repository(folder)
    if repository is None:
        raise PublishError(f"{folder} has no {CONFIG_FILE}; is it a model folder in model_repo?")
    try:
        return repository.for_version(version)
    except ConfigError as error:
        raise PublishError(f"{folder / CONFIG_FILE} cannot be extended: {error}") from error


def replace_files(folder: Path, version: ModelConfig) -> dict[str, Any]:
    """config.json with a version's `files` and `ap_cost` replaced, and nothing else."""
    content: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_bytes())
    entry = content["versions"][str(version.version)]
    entry.pop("ap_cost", None)
    entry.update(_measured(version))
    _check_unchanged(read_repository(folder), content, version)
    return content


def _check_unchanged(
    repository: RepositoryConfig | None, config: dict[str, Any], version: ModelConfig
) -> None:
    """Asserts that a new config.json parses to `version` and to the other existing versions."""
    merged = parse_model_config(json.dumps(config))
    assert merged.for_version(version.version) == version
    for number in repository.version_numbers if repository else []:
        if repository is not None and number != version.version:
            assert merged.for_version(number) == repository.for_version(number)
