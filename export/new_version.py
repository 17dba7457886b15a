"""What is published of a checkpoint: its configuration, provenance and weights."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.config_json import read_repository
from export.errors import ExportError
from export.onnx_graph import num_candidates
from export.publish import next_version, require_free
from pipeline.canvases import choose_canvases
from pipeline.model_config import ModelConfig
from service.models.repository import ONNX_FILE
from training.configs.schema import Config
from training.model.solo import Solo
from training.weights.formats import WEIGHTS_FILE, load_provenance, save_checkpoint

PLACEHOLDER = {"sha256": "0" * 64, "bytes": 1}
"""The graph's file entry until the graph is built."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint file with its configuration and network."""

    file: Path
    config: Config
    network: Solo


def choose_version(config: Config, options: argparse.Namespace) -> tuple[str, int]:
    """Name and version to publish.

    Raises:
        PublishError: The version exists; checked before the export, which takes long.
    """
    name = options.name or config.name
    if options.version is None:
        return name, next_version(options.out / name)
    require_free(options.out, name, options.version, force=options.force)
    return name, options.version


def describe_model(source: LoadedCheckpoint, options: argparse.Namespace) -> ModelConfig:
    """The version's configuration, with placeholders for its files and without provenance.

    Raises:
        ExportError: The checkpoint has no class names, or an option has an invalid value.
    """
    config = source.config
    if len(config.classes) != config.num_classes:
        raise ExportError(
            f"{source.file} has {len(config.classes)} class names, but its network has "
            f"{config.num_classes} classes; solo-train stores the names of the data set"
        )
    changes = {"score_threshold": options.score_threshold, "max_instances": options.max_instances}
    postprocess = config.postprocess.model_dump()
    postprocess.update({name: value for name, value in changes.items() if value is not None})
    name, version = choose_version(config, options)
    try:
        return ModelConfig.model_validate(
            {
                "name": name,
                "version": version,
                "task": config.task,
                "description": options.description or config.description,
                "input": config.input.model_dump(),
                "card": read_card(options.card, options.out / name),
                "classes": [c.model_dump() for c in config.classes],
                "candidates": num_candidates(source.network),
                "mask_stride": min(config.model.head.mask_strides),
                "postprocess": postprocess,
                "limits": {"max_batch": options.max_batch},
                "canvases": choose_canvases(config.input),
                "files": {ONNX_FILE: PLACEHOLDER},
            }
        )
    except ValueError as error:
        raise ExportError(f"config.json would be invalid: {error}") from error


def read_card(file: Path | None, folder: Path) -> dict[str, Any]:
    """The file of --card, or the card that a model's folder has.

    Raises:
        ExportError: The file cannot be read or is not a JSON object.
        PublishError: The folder's config.json is invalid.
    """
    if file is not None:
        return read_object(file, "card")
    repository = read_repository(folder)
    return (repository and repository.card) or {}


def read_object(file: Path, option: str) -> dict[str, Any]:
    """Reads the file of an option.

    Raises:
        ExportError: The file cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{file} cannot be read as {option}: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{file} contains a {type(content).__name__}, expected a JSON object")
    return content


def pack_weights(source: LoadedCheckpoint) -> bytes:
    """A checkpoint of the exported network without the state of its training."""
    content = {
        "model": source.network.state_dict(),
        "ema": {},
        "provenance": load_provenance(source.file),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS_FILE
        save_checkpoint(path, source.config, content)
        return path.read_bytes()
