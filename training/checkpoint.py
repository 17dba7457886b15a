"""Checkpoints: everything a run needs to go on exactly, in tensors and plain types."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from training.configs.schema import Config
from training.model.solo import Solo

FORMAT = "solo-serve checkpoint"
FORMAT_VERSION = 1
REQUIRED = ("format_version", "config", "model", "ema")
_CONFIG = TypeAdapter(Config)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message says which and why."""


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON types."""
    content: dict[str, Any] = _CONFIG.dump_python(config, mode="json")
    return content


def config_from_dict(content: dict[str, Any]) -> Config:
    """The inverse of `config_to_dict`.

    Raises:
        CheckpointError: A field is unknown or has a wrong value.
    """
    try:
        config = _CONFIG.validate_python(content)
    except ValidationError as error:
        raise CheckpointError(f"the stored configuration does not fit: {error}") from error
    unknown = _unknown_fields(content, config_to_dict(config))
    if unknown:
        raise CheckpointError(
            f"the stored configuration has unknown fields: {', '.join(unknown[:5])}"
        )
    return config


def _unknown_fields(content: Any, known: Any, path: str = "") -> list[str]:
    """Dotted names that the configuration classes do not have."""
    if not isinstance(content, dict) or not isinstance(known, dict):
        return []
    found = [path + key for key in content if key not in known]
    for key in content.keys() & known.keys():
        found += _unknown_fields(content[key], known[key], f"{path}{key}.")
    return sorted(found)


def save_checkpoint(path: Path, config: Config, state: dict[str, Any]) -> None:
    """Writes atomically: a crash leaves the old file or the new one, never half of one.

    The bytes are on the disk before the name is: else a machine that loses its power may keep
    the new name without its content.
    """
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config_to_dict(config),
        **state,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path) -> tuple[Config, dict[str, Any]]:
    """Reads a checkpoint without running code from it (`weights_only=True`).

    Raises:
        CheckpointError: Missing, damaged, or not one of ours.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path}") from error
    except Exception as error:  # a damaged pickle fails in whatever way its bytes lead to
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a solo-serve checkpoint")
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        raise CheckpointError(f"{path} is incomplete: it has no {', '.join(missing)}")
    if content["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {content['format_version']}, expected {FORMAT_VERSION}"
        )
    return config_from_dict(content.pop("config")), content


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copies a state dict into a model.

    Raises:
        CheckpointError: Names the first keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("shape", shapes)):
        if keys:
            raise CheckpointError(
                f"weights of {source} do not fit: {what} {', '.join(keys[:5])}"
                + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            )
    model.load_state_dict(state)


def load_provenance(path: Path) -> dict[str, Any]:
    """What solo-import noted about the origin of a checkpoint; empty if it was trained here."""
    provenance: dict[str, Any] = load_checkpoint(path)[1].get("provenance", {})
    return provenance


def load_model(path: Path) -> tuple[Config, Solo]:
    """The model of a checkpoint in evaluation mode, averaged weights if the run kept any."""
    config, content = load_checkpoint(path)
    model = Solo(config.model, config.num_classes)
    load_weights(model, content["ema"] or content["model"], str(path))
    return config, model.eval()
