"""Initial weights of a run, `solo-train --init`: an ImageNet backbone or a whole SOLO model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import Tensor

from pipeline.model_config import ClassSpec
from training.configs.schema import BackboneConfig, BackboneKind, Config
from training.model.efficientnet import PUBLISHED_WIDTH
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
from training.weights.sources import find_efficientnet, get_imagenet

IMAGENET = "imagenet"
CATEGORIES = "head.category_out."
STEMS: dict[BackboneKind, str] = {
    "resnet": "conv1.weight",
    "efficientnet_lite0": "_conv_stem.weight",
}
"""A weight by which the file of a backbone is known."""
EFFICIENTNET_CLASSIFIER = ("_conv_head.", "_bn1.", "_fc.")


def read_network(init: str) -> Config | BackboneKind | None:
    """What `initialise` would load: a model, a kind of backbone, or None if that is open.

    Batch norm whose statistics are folded into the convolutions is frozen.

    Raises:
        CheckpointError: There is no such file, or it is not valid.
    """
    if init == IMAGENET:
        return None
    path = find_weights(Path(init)) if Path(init).is_dir() else Path(init)
    try:
        tensors = read_weights(path).tensors
    except OwnCheckpointError:
        config, content = load_checkpoint(path)
        if not _is_folded(content):
            return config
        backbone = replace(config.model.backbone, norm="frozen_bn")
        return replace(config, model=replace(config.model, backbone=backbone))
    return next((kind for kind, stem in STEMS.items() if stem in tensors), None)


def _is_folded(content: dict[str, Any]) -> bool:
    """Whether the batch norm does nothing: its statistics are part of the convolutions."""
    means = [v for key, v in content["model"].items() if key.endswith(".running_mean")]
    variances = [v for key, v in content["model"].items() if key.endswith(".running_var")]
    same = all(bool((v == 0).all()) for v in means) and all(bool((v == 1).all()) for v in variances)
    return bool(means) and same


def initialise(model: Solo, init: str, classes: Sequence[ClassSpec] = ()) -> list[str]:
    """Fills a new model with trained weights.

    Args:
        model: Changed in place.
        init: `imagenet` downloads torchvision's ResNet of the model's depth into the cache, or
            takes EfficientNet-Lite0 from its package. A file is such a backbone or a checkpoint of
            solo-train or solo-import; a folder is a model of model_repo whose latest version has a
            checkpoint, weights.pt. The category output keeps its initial weights if the
            checkpoint has other classes.
        classes: The model's classes; empty: only their number is compared with the checkpoint's.

    Returns:
        What was loaded and what was not, one line each.

    Raises:
        CheckpointError: The weights do not fit; names the first keys that differ.
        ValueError: There are no ImageNet weights of this depth.
        DownloadError: They cannot be downloaded.
    """
    path = _find_imagenet(model.config.backbone) if init == IMAGENET else Path(init)
    if path.is_dir():
        path = find_weights(path)
    try:
        weights = read_weights(path)
    except OwnCheckpointError:
        return _load_solo(model, path, [c.name for c in classes])
    return _load_backbone(model, weights.tensors, path)


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


def _find_imagenet(backbone: BackboneConfig) -> Path:
    """The file of the ImageNet weights of a backbone, downloaded if necessary."""
    if backbone.kind == "resnet":
        return get_imagenet(backbone.depth).download()
    if backbone.base_width != PUBLISHED_WIDTH:
        raise CheckpointError(
            f"EfficientNet-Lite0's ImageNet weights are for a base_width of {PUBLISHED_WIDTH}, the "
            f"configuration has {backbone.base_width}: --set model.backbone.base_width="
            f"{PUBLISHED_WIDTH}"
        )
    return find_efficientnet()


def _load_backbone(model: Solo, tensors: dict[str, Tensor], path: Path) -> list[str]:
    """Loads the state dict of an ImageNet classifier into the backbone."""
    kind = model.config.backbone.kind
    if STEMS[kind] not in tensors:
        expected = {
            "resnet": "a ResNet with torchvision's names",
            "efficientnet_lite0": "EfficientNet-Lite0 with the names of its package",
        }[kind]
        raise CheckpointError(
            f"{path} is not {expected}, its first is "
            f"{next(iter(tensors))}; solo-import converts published SOLO checkpoints for --init"
        )
    backbone = model.backbone.state_dict()
    if kind == "resnet":
        state, notes = without_classifier(tensors)
    else:
        state, notes = convert_efficientnet(tensors)
    report = [f"backbone: {len(state)} tensors of {path.name}", *notes]
    offsets = [key for key in backbone if ".conv_offset." in key and key not in state]
    counters = [key for key in backbone if key.endswith(COUNTER)]
    state |= {key: backbone[key] for key in [*offsets, *counters] if key not in state}
    if offsets:
        report.append(f"{len(offsets)} tensors of deformable convolutions keep initial weights")
    load_weights(model.backbone, state, str(path))
    return report


def convert_efficientnet(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """EfficientNet-Lite0's weights under our names, without its classifier, and a note of that."""
    dropped = [key for key in tensors if key.startswith(EFFICIENTNET_CLASSIFIER)]
    state = {
        ".".join(part.removeprefix("_") for part in key.split(".")): value
        for key, value in tensors.items()
        if key not in dropped
    }
    return state, [f"{', '.join(dropped)} left out: the ImageNet classifier"] if dropped else []


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
