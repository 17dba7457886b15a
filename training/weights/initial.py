"""Initial weights of a run, `solo-train --init`: ImageNet's ResNet or a whole SOLO model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import Tensor

from pipeline.model_config import ClassSpec
from training.configs.schema import Config
from training.model.solo import Solo
from training.weights.download import hash_file
from training.weights.formats import (
    WEIGHTS_FILE,
    CheckpointError,
    OwnCheckpointError,
    load_checkpoint,
    load_weights,
    read_weights,
)
from training.weights.importing import COUNTER, without_classifier
from training.weights.sources import get_imagenet

IMAGENET = "imagenet"
CATEGORIES = "head.category_out."


def read_network(init: str) -> Config | None:
    """The configuration of the model that `initialise` would load; None if it is a backbone.

    Batch norm whose statistics are folded into the convolutions is frozen.

    Raises:
        CheckpointError: There is no such file, or it is not valid.
    """
    if init == IMAGENET:
        return None
    path = find_weights(Path(init)) if Path(init).is_dir() else Path(init)
    try:
        read_weights(path)
    except OwnCheckpointError:
        config, content = load_checkpoint(path)
        if not _is_folded(content):
            return config
        backbone = replace(config.model.backbone, norm="frozen_bn")
        return replace(config, model=replace(config.model, backbone=backbone))
    return None


def _is_folded(content: dict[str, Any]) -> bool:
    return bool(content.get("provenance", {}).get("batch_norm") == "folded")


def initialise(model: Solo, init: str, classes: Sequence[ClassSpec] = ()) -> list[str]:
    """Fills a new model with trained weights.

    Args:
        model: Changed in place.
        init: `imagenet` downloads torchvision's ResNet of the model's depth into the cache. A
            file is such a ResNet or a checkpoint of solo-train or solo-import; a folder is a
            model of model_repo whose latest version has a checkpoint, weights.pt. The category
            output keeps its initial weights if the checkpoint has other classes.
        classes: The model's classes; empty: only their number is compared with the checkpoint's.

    Returns:
        What was loaded and what was not, one line each.

    Raises:
        CheckpointError: The weights do not fit; names the first keys that differ.
        ValueError: There are no ImageNet weights of this depth.
        DownloadError: They cannot be downloaded.
    """
    imagenet = init == IMAGENET
    path = get_imagenet(model.config.backbone.depth).download() if imagenet else Path(init)
    if path.is_dir():
        path = find_weights(path)
    try:
        weights = read_weights(path)
    except OwnCheckpointError:
        return _load_solo(model, path, [c.name for c in classes])
    return _load_resnet(model, weights.tensors, path)


def hash_initial(init: str | None) -> str | None:
    """What identifies initial weights: `imagenet`, the SHA-256 of the file, or None.

    Raises:
        OSError: There is no such file.
        CheckpointError: A folder of model_repo has no weights.
    """
    if init is None or init == IMAGENET:
        return init
    path = Path(init)
    return hash_file(find_weights(path) if path.is_dir() else path)


def find_weights(folder: Path) -> Path:
    """The checkpoint in a model_repo folder's latest version, with its hash checked.

    Raises:
        CheckpointError: config.json is not valid, or the version has no such file.
    """
    from service.models.repository import ModelRefused, read_config

    try:
        config = read_config(folder)
    except ModelRefused as error:
        raise CheckpointError(str(error)) from error
    path = folder / str(config.version) / WEIGHTS_FILE
    described = config.provenance.get("weights")
    if not path.is_file() or not isinstance(described, dict):
        raise CheckpointError(
            f"{path} is missing or not in {folder / 'config.json'}; solo-export --weights adds it "
            "to a new version, and --init also takes the checkpoint itself"
        )
    found = hash_file(path)
    if found != described.get("sha256"):
        raise CheckpointError(
            f"{path} has the SHA-256 {found}, config.json has {described.get('sha256')}"
        )
    return path


def _load_resnet(model: Solo, tensors: dict[str, Tensor], path: Path) -> list[str]:
    """Loads torchvision's state dict into the backbone."""
    if "conv1.weight" not in tensors:
        raise CheckpointError(
            f"{path} is not a ResNet with torchvision's names, its first is "
            f"{next(iter(tensors))}; solo-import converts published SOLO checkpoints for --init"
        )
    backbone = model.backbone.state_dict()
    state, notes = without_classifier(tensors)
    report = [f"backbone: {len(state)} tensors of {path.name}", *notes]
    offsets = [key for key in backbone if ".conv_offset." in key and key not in state]
    counters = [key for key in backbone if key.endswith(COUNTER)]
    state |= {key: backbone[key] for key in [*offsets, *counters] if key not in state}
    if offsets:
        report.append(f"{len(offsets)} tensors of deformable convolutions keep initial weights")
    load_weights(model.backbone, state, str(path))
    return report


def _load_solo(model: Solo, path: Path, names: Sequence[str]) -> list[str]:
    """Loads a checkpoint of ours, except for a category output of other classes."""
    config, content = load_checkpoint(path)
    if _is_folded(content) and model.config.backbone.norm == "bn":
        raise CheckpointError(
            f"{path} has its batch norm folded into the convolutions, so it has no statistics to "
            "continue from; --set model.backbone.norm=frozen_bn"
        )
    state: dict[str, Tensor] = content["ema"] or content["model"]
    own = model.state_dict()
    theirs = [c.name for c in config.classes]
    differ = config.num_classes != model.num_classes or bool(names and theirs and names != theirs)
    new = [key for key in own if differ and key.startswith(CATEGORIES)]
    load_weights(model, {**state, **{key: own[key] for key in new}}, str(path))
    report = [f"model: {len(own) - len(new)} tensors of {path.name}"]
    if new:
        report.append(
            f"{', '.join(new)} keep initial weights: the classes differ, {path.name} has "
            + (shorten(", ".join(theirs), 100, placeholder=" ...") or str(config.num_classes))
        )
    return report
