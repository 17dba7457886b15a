"""Weights that a run starts from: ImageNet's ResNet, or a whole SOLO model to fine-tune."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from training.catalogue import get_imagenet
from training.checkpoint import CheckpointError, load_checkpoint, load_weights
from training.download import fetch
from training.from_onnx import read_published
from training.model.solo import Solo
from training.torch_files import OwnCheckpointError, read_weights

IMAGENET = "imagenet"
CLASSIFIER = ("fc.weight", "fc.bias")
CATEGORIES = "head.category_out."


def initialise(model: Solo, init: str) -> list[str]:
    """Fills a new model with weights that were trained before.

    Args:
        model: Changed in place.
        init: `imagenet` downloads torchvision's ResNet of the model's depth into the cache. A
            file is either such a ResNet or a checkpoint of solo-train or solo-import, a folder a
            model of model_repo; of the latter two the category output stays new where the
            classes are other ones.

    Returns:
        What was loaded and what was not, one line each.

    Raises:
        CheckpointError: The weights do not fit; names the first keys that differ.
        ValueError: There are no ImageNet weights of this depth.
        DownloadError: They cannot be fetched.
    """
    if init == IMAGENET:
        published = get_imagenet(model.config.backbone.depth)
        path = fetch(published.location(), published.file_name, sha256=published.sha256)
    else:
        path = Path(init)
    if path.is_dir():
        return _load_solo(model, read_published(path, model), path)
    try:
        weights = read_weights(path)
    except OwnCheckpointError:
        _, content = load_checkpoint(path)
        return _load_solo(model, content["ema"] or content["model"], path)
    return _load_resnet(model, weights.tensors, path)


def _load_resnet(model: Solo, tensors: dict[str, Tensor], path: Path) -> list[str]:
    """Loads torchvision's state dict into the backbone."""
    if "conv1.weight" not in tensors:
        raise CheckpointError(
            f"{path} is no ResNet of torchvision's layout, it begins with {next(iter(tensors))}; "
            "solo-import turns published SOLO checkpoints into ones that --init takes"
        )
    backbone = model.backbone.state_dict()
    state = {key: value for key, value in tensors.items() if key not in CLASSIFIER}
    report = [f"backbone: {len(state)} tensors of {path.name}"]
    if len(state) < len(tensors):
        report.append("fc.weight, fc.bias left out: the ImageNet classifier")
    offsets = [key for key in backbone if ".conv_offset." in key and key not in state]
    counters = [key for key in backbone if key.endswith("num_batches_tracked")]
    state |= {key: backbone[key] for key in [*offsets, *counters] if key not in state}
    if offsets:
        report.append(f"{len(offsets)} tensors of deformable convolutions start new")
    load_weights(model.backbone, state, str(path))
    return report


def _load_solo(model: Solo, state: dict[str, Tensor], path: Path) -> list[str]:
    """Loads a whole model of ours, except for a category output of another shape."""
    own = model.state_dict()
    new = [
        key
        for key, value in own.items()
        if key.startswith(CATEGORIES) and key in state and state[key].shape != value.shape
    ]
    load_weights(model, {**state, **{key: own[key] for key in new}}, str(path))
    report = [f"model: {len(own) - len(new)} tensors of {path.name}"]
    if new:
        report.append(f"{', '.join(new)} start new: the classes are other ones")
    return report
