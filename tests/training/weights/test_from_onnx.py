"""--init with a folder of model_repo: the network of the graph, and graphs that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from export.__main__ import main as export_main
from export.parity import build_cases, compare
from tests.support.tiny_solo import save_tiny_checkpoint, tiny_config
from training.configs import get_config
from training.configs.schema import BackboneConfig, Config
from training.model.solo import Solo
from training.weights.formats import CheckpointError
from training.weights.importing import initialise

Norm = Literal["frozen_bn", "bn", "gn"]
BUNDLED = Path(__file__).resolve().parents[3] / "model_repo" / "nuclei"


def with_model(config: Config, **changes: Any) -> Config:
    return replace(config, model=replace(config.model, **changes))


def with_head(config: Config, **changes: Any) -> Config:
    return with_model(config, head=replace(config.model.head, **changes))


def with_norm(config: Config, norm: Norm) -> Config:
    return with_model(config, backbone=replace(config.model.backbone, norm=norm))


NUCLEI = with_norm(get_config("nuclei"), "frozen_bn")
DEFORMABLE = with_head(
    with_model(
        tiny_config("decoupled_light"),
        backbone=BackboneConfig(depth=50, base_width=8, deformable_stages=(4,)),
    ),
    deformable=True,
)
TINY = {
    "light": tiny_config("decoupled_light"),
    "group_norm": with_norm(tiny_config("decoupled_light"), "gn"),
    "deformable": DEFORMABLE,
    "vanilla": tiny_config("vanilla"),
}


def new_model(config: Config, classes: int = 1) -> Solo:
    torch.manual_seed(1)
    return Solo(config.model, classes)


def test_the_bundled_model_finds_what_its_graph_finds() -> None:
    model = new_model(NUCLEI)
    tensors = len(model.state_dict())
    assert initialise(model, str(BUNDLED)) == [f"model: {tensors} tensors of nuclei"]
    graph = (BUNDLED / "2" / "model.onnx").read_bytes()
    report = compare(model.eval(), graph, build_cases([(192, 160)], [1]))
    assert report["passed"] and report["total"]["candidates_onnx"] > 5
    assert report["total"]["unmatched"] == 0


def test_other_classes_start_new() -> None:
    same, other = new_model(NUCLEI), new_model(NUCLEI, 3)
    new = {k: v.clone() for k, v in other.state_dict().items() if "category_out" in k}
    initialise(same, str(BUNDLED))
    assert initialise(other, str(BUNDLED))[1:] == [
        "head.category_out.weight, head.category_out.bias keep initial weights: "
        "the number of classes differs"
    ]
    for key, value in same.state_dict().items():
        assert torch.equal(other.state_dict()[key], new.get(key, value)), key


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (get_config("nuclei"), r"batch norm folded.*--set model\.backbone\.norm=frozen_bn"),
        (with_norm(NUCLEI, "gn"), r"has 0 Reshape nodes behind \S+, .* backbone\.conv1"),
        (
            with_head(NUCLEI, norm_groups=16),
            r"8 groups in head\.category_convs\.0\.gn, expected 16",
        ),
        (with_head(NUCLEI, num_convs=3), r"no place for: head\.category_convs\.3\.conv\.weight"),
        (with_head(NUCLEI, num_convs=5), r"no .* the weight head\.category_convs\.4\.conv"),
        (
            with_head(NUCLEI, num_grids=(40, 18, 9)),
            r"do not fit, other shapes: head\.mask_out_x\.0\.weight",
        ),
        (with_head(NUCLEI, kind="vanilla"), r"no .* the weight head\.mask_convs\.0\.conv"),
    ],
)
def test_another_network_is_refused(config: Config, message: str) -> None:
    model = new_model(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        initialise(model, str(BUNDLED))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_would_not_be_served_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "nuclei"
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["2"]["files"]["model.onnx"]["sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.onnx.* its SHA-256 is"):
        initialise(new_model(NUCLEI), str(folder))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        initialise(new_model(NUCLEI), str(tmp_path))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports a tiny network when it is first asked for."""
    root = tmp_path_factory.mktemp("published")

    def export(name: str) -> Path:
        if not (root / name).exists():
            save_tiny_checkpoint(root / f"{name}.pt", replace(TINY[name], name=name))
            assert export_main([str(root / f"{name}.pt"), "--out", str(root)]) == 0
        return root / name

    return export


@torch.inference_mode()
def logits_of(model: Solo) -> list[Tensor]:
    images = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(3))
    outputs = model.eval()(images)
    return [logits for o in outputs for logits in (o.category_logits, *o.mask_inputs)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norm"), [("light", "frozen_bn"), ("group_norm", "gn"), ("deformable", "frozen_bn")]
)
def test_an_exported_network_computes_what_its_checkpoint_did(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str, norm: Norm
) -> None:
    model = new_model(with_norm(TINY[name], norm), 2)
    initialise(model, str(folder_of(name)))
    source = save_tiny_checkpoint(tmp_path / "same.pt", TINY[name])
    for found, expected in zip(logits_of(model), logits_of(source), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("group_norm", r"input 2 of \S+ \(Conv\), which belongs to backbone\.bn1"),
        ("vanilla", r"weight head\.mask_out\.0\.weight.* only its checkpoint can start"),
    ],
)
def test_a_graph_that_is_not_understood_is_refused(
    folder_of: Callable[[str], Path], name: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        initialise(new_model(with_norm(TINY[name], "frozen_bn"), 2), str(folder_of(name)))
