"""--init: ImageNet's ResNet from a local mirror, and checkpoints to fine-tune."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model_config import ClassSpec
from tests.support.file_server import FileServer, serve_files
from tests.support.published import small_config, write_published
from tests.support.tiny import build_tiny_data
from tests.support.tiny_solo import save_tiny_checkpoint, tiny_config
from training.configs.schema import BackboneConfig, Config
from training.model.resnet import ResNet
from training.model.solo import Solo
from training.train import main as train_main
from training.weights.download import DownloadError
from training.weights.formats import CheckpointError, load_checkpoint, save_checkpoint
from training.weights.initial import initialise, read_network
from training.weights.sources import IMAGENET_RESNETS, PublishedFile

RESNET_18 = BackboneConfig(depth=18, base_width=8)  # torchvision's is 64 wide


def config_of(backbone: BackboneConfig) -> Config:
    config = small_config()
    return replace(config, model=replace(config.model, backbone=backbone))


def new_model(backbone: BackboneConfig = RESNET_18) -> Solo:
    torch.manual_seed(1)
    return Solo(config_of(backbone).model, 80)


def resnet_state(depth: int = 18, base_width: int = 8) -> dict[str, Tensor]:
    """As torchvision's: the backbone's names and the classifier's."""
    torch.manual_seed(2)
    backbone = ResNet(BackboneConfig(depth=depth, base_width=base_width))  # type: ignore[arg-type]
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    state["bn1.running_mean"] += 0.5
    out = backbone.out_channels[-1]
    return state | {"fc.weight": torch.zeros(1000, out), "fc.bias": torch.zeros(1000)}


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    """Serves a ResNet-18 under a name that carries its hash, as torchvision's do."""
    buffer = io.BytesIO()
    torch.save(resnet_state(), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    name = f"resnet18-{digest}.pth"
    file = PublishedFile(name="resnet18", file_name=name, url="http://x.invalid/", sha256=digest)
    monkeypatch.setitem(IMAGENET_RESNETS, 18, file)
    monkeypatch.setenv("SOLO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve_files({name: buffer.getvalue()}) as server:
        monkeypatch.setenv("SOLO_MIRROR", server.url)
        yield server


def test_imagenet_fills_the_backbone_and_nothing_else(mirror: FileServer) -> None:
    model, untouched, state = new_model(), new_model().state_dict(), resnet_state()
    report = initialise(model, "imagenet")
    assert report[0].startswith("backbone: 120 tensors of resnet18-")
    assert report[1:] == ["fc.weight, fc.bias left out: the ImageNet classifier"]
    for key, value in model.state_dict().items():
        part, _, name = key.partition(".")
        assert torch.equal(value, state[name] if part == "backbone" else untouched[key]), key
    initialise(new_model(), "imagenet")
    assert len(mirror.requests) == 1


def test_another_width_names_the_shapes(mirror: FileServer) -> None:
    narrow = new_model(BackboneConfig(depth=18, base_width=4))
    expected = r"other shapes: conv1\.weight \(8, 3, 7, 7\), expected \(4, 3, 7, 7\).* and \d+ more"
    with pytest.raises(CheckpointError, match=expected):
        initialise(narrow, "imagenet")


def test_another_depth_names_the_keys(tmp_path: Path) -> None:
    torch.save(resnet_state(18), tmp_path / "r18.pth")
    with pytest.raises(
        CheckpointError, match=r"r18\.pth do not fit, missing keys: layer1\.2\.conv1"
    ):
        initialise(new_model(BackboneConfig(depth=34, base_width=8)), str(tmp_path / "r18.pth"))


def test_group_norm_has_no_imagenet_weights(mirror: FileServer) -> None:
    with pytest.raises(CheckpointError, match="unexpected keys: bn1"):
        initialise(new_model(BackboneConfig(depth=18, base_width=8, norm="gn")), "imagenet")


def test_what_older_files_and_deformable_layers_lack_starts_new(tmp_path: Path) -> None:
    state = {k: v for k, v in resnet_state(50).items() if "num_batches_tracked" not in k}
    torch.save(state, tmp_path / "r50.pth")
    model = new_model(BackboneConfig(depth=50, base_width=8, deformable_stages=(4,)))
    report = initialise(model, str(tmp_path / "r50.pth"))
    assert "6 tensors of deformable convolutions keep initial weights" in report
    found = model.backbone.state_dict()
    assert all(torch.equal(found[k], v) for k, v in state.items() if not k.startswith("fc."))
    offsets = [value for key, value in found.items() if "conv_offset" in key]
    assert len(offsets) == 6 and all((value == 0).all() for value in offsets)


def test_offline(monkeypatch: pytest.MonkeyPatch, mirror: FileServer, tmp_path: Path) -> None:
    mirror.files.clear()
    with pytest.raises(DownloadError, match=r"resnet18-.*404.* put the file at .*cache/resnet18-"):
        initialise(new_model(), "imagenet")


def test_a_checkpoint_to_fine_tune(tmp_path: Path) -> None:
    source = save_tiny_checkpoint(tmp_path / "a.pt", tiny_config())
    state = source.state_dict()
    same = Solo(tiny_config().model, 2)
    assert initialise(same, str(tmp_path / "a.pt")) == [f"model: {len(state)} tensors of a.pt"]
    assert all(torch.equal(v, state[k]) for k, v in same.state_dict().items())
    other = Solo(tiny_config().model, 5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    assert initialise(other, str(tmp_path / "a.pt"))[1:] == [
        "head.category_out.weight, head.category_out.bias keep initial weights: "
        "the classes differ, a.pt has disc, ring"
    ]
    for key, value in other.state_dict().items():
        kept = before if key.startswith("head.category_out") else state
        assert torch.equal(value, kept[key]), key


@pytest.mark.parametrize(
    ("names", "kept"),
    [(["disc", "ring"], False), (["ring", "disc"], True), (["leaf", "pod"], True)],
)
def test_other_classes_of_the_same_number(tmp_path: Path, names: list[str], kept: bool) -> None:
    source = save_tiny_checkpoint(tmp_path / "a.pt", tiny_config()).state_dict()
    model = Solo(tiny_config().model, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [ClassSpec(category_id=i, name=name) for i, name in enumerate(names, 20)]
    report = initialise(model, str(tmp_path / "a.pt"), classes)
    assert ["the classes differ" in line for line in report[1:]] == [True] * kept
    assert str(len(source) - 2 * kept) in report[0]
    for key, value in model.state_dict().items():
        expected = before if kept and key.startswith("head.category_out.") else source
        assert torch.equal(value, expected[key]), key


def test_the_network_of_initial_weights(tmp_path: Path) -> None:
    config = tiny_config()
    state = save_tiny_checkpoint(tmp_path / "a.pt", config).state_dict()
    assert read_network(str(tmp_path / "a.pt")) == config
    for key, value in state.items():
        if key.endswith((".running_mean", ".running_var")):
            state[key] = torch.full_like(value, float(key.endswith("var")))
    save_checkpoint(tmp_path / "folded.pt", config, {"model": state, "ema": {}})
    network = read_network(str(tmp_path / "folded.pt"))
    assert isinstance(network, Config) and network.model.backbone.norm == "frozen_bn"
    torch.save(resnet_state(), tmp_path / "resnet.pth")
    assert read_network(str(tmp_path / "resnet.pth")) == "resnet"
    assert read_network("imagenet") is None
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_network(str(tmp_path / "none.pt"))


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "a.pt", tiny_config("vanilla"))
    with pytest.raises(
        CheckpointError, match=r"a\.pt do not fit, unexpected keys: head\.mask_convs\.0"
    ):
        initialise(Solo(tiny_config("decoupled").model, 2), str(tmp_path / "a.pt"))


def test_other_files_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    write_published(tmp_path / "solo.pth", small_config())
    with pytest.raises(
        CheckpointError, match=r"is not a ResNet with torchvision.*solo-import converts"
    ):
        initialise(new_model(), str(tmp_path / "solo.pth"))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        initialise(new_model(), str(tmp_path / "none.pth"))
    monkeypatch.delitem(IMAGENET_RESNETS, 18)
    with pytest.raises(ValueError, match="no ImageNet weights for ResNet-18"):
        initialise(new_model(), "imagenet")


def train_command(folder: Path, *more: str) -> list[str]:
    """A run of two steps whose learning rate is zero."""
    data = build_tiny_data(folder / "data")
    settings = (
        *("model.backbone.base_width=8", "model.neck_channels=16", "model.head.channels=16"),
        *("model.head.num_convs=1", "model.head.norm_groups=4", "model.head.num_grids=[8,4,2]"),
        *("input.resize.scale=1", "input.resize.tile_hw=[64,64]", "input.resize.overlap_px=16"),
        *("schedule.batch_size=2", "schedule.epochs=1", "schedule.lr=0", *more),
    )
    command = ["nuclei", "--data", str(data), "--out", str(folder / "run"), "--workers", "0"]
    return [*command, "--val-split", "", *(part for s in settings for part in ("--set", s))]


def test_solo_train_starts_from_the_weights_and_resumes_without_them(
    tmp_path: Path, capsys: Any
) -> None:
    command, state = train_command(tmp_path), resnet_state()
    torch.save(state, tmp_path / "resnet.pth")
    assert train_main([*command, "--init", str(tmp_path / "resnet.pth")]) == 0
    assert "solo-train: backbone: 120 tensors of resnet.pth" in capsys.readouterr().out
    _, content = load_checkpoint(tmp_path / "run" / "last.pt")
    for weights in (content["model"], content["ema"]):
        for key in ("conv1.weight", "layer4.1.conv2.weight"):
            assert torch.equal(weights[f"backbone.{key}"], state[key])
    missing = ["--init", str(tmp_path / "none.pth")]
    assert train_main([*command, *missing]) == 0
    assert train_main([*command, *missing, "--restart"]) == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_solo_train_refuses_a_frozen_random_backbone(tmp_path: Path, capsys: Any) -> None:
    command = train_command(tmp_path, "model.backbone.norm=frozen_bn")
    assert train_main(command) == 1
    assert "would be random" in capsys.readouterr().err
    torch.save(resnet_state(), tmp_path / "resnet.pth")
    assert train_main([*command, "--init", str(tmp_path / "resnet.pth")]) == 0
    assert train_main(command) == 0  # it resumes
