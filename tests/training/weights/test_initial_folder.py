"""--init with a folder of model_repo: weights.pt of the bundled model, and of exported ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from export.__main__ import main as export_main
from export.parity import build_cases, compare
from tests.support.tiny_solo import save_tiny_checkpoint, tiny_config
from training.configs import get_config
from training.configs.schema import BackboneConfig, Config
from training.model.solo import Solo
from training.weights.formats import CheckpointError, load_checkpoint, save_checkpoint
from training.weights.initial import initialise

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
    "plain_norm": with_norm(tiny_config("decoupled_light"), "bn"),
    "group_norm": with_norm(tiny_config("decoupled_light"), "gn"),
    "deformable": DEFORMABLE,
    "vanilla": tiny_config("vanilla"),
}


def new_model(config: Config, classes: int = 1) -> Solo:
    torch.manual_seed(1)
    return Solo(config.model, classes)


def test_the_bundled_weights_compute_what_the_bundled_graph_does() -> None:
    model = new_model(NUCLEI)
    tensors = len(model.state_dict())
    assert initialise(model, str(BUNDLED)) == [f"model: {tensors} tensors of weights.pt"]
    graph = (BUNDLED / "4" / "model.onnx").read_bytes()
    report = compare(model.eval(), graph, build_cases([(192, 160)], [1]))
    assert report["passed"] and report["total"]["candidates_onnx"] > 5
    assert report["total"]["unmatched"] == 0


def test_another_number_of_classes_keeps_the_initial_category_output() -> None:
    same, other = new_model(NUCLEI), new_model(NUCLEI, 3)
    new = {k: v.clone() for k, v in other.state_dict().items() if "category_out" in k}
    initialise(same, str(BUNDLED))
    assert initialise(other, str(BUNDLED))[1:] == [
        "head.category_out.weight, head.category_out.bias keep initial weights: "
        "the classes differ, weights.pt has nucleus"
    ]
    for key, value in same.state_dict().items():
        assert torch.equal(other.state_dict()[key], new.get(key, value)), key


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (get_config("nuclei"), r"batch norm folded.*--set model\.backbone\.norm=frozen_bn"),
        (with_norm(NUCLEI, "gn"), r"unexpected keys: backbone\.bn1\.running_mean"),
        (with_head(NUCLEI, num_convs=3), r"unexpected keys: head\.category_convs\.3\.conv\.weight"),
        (with_head(NUCLEI, num_convs=5), r"missing keys: head\.category_convs\.4\.conv"),
        (with_head(NUCLEI, num_grids=(40, 18, 9)), r"other shapes: head\.mask_out_x\.0\.weight"),
        (with_head(NUCLEI, kind="vanilla"), r"unexpected keys: head\.mask_convs_x\.0\.conv"),
    ],
)
def test_another_network_is_refused(config: Config, message: str) -> None:
    model = new_model(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        initialise(model, str(BUNDLED))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The bundled model without its graphs, which --init does not read."""
    folder = tmp_path / "nuclei"
    shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("*.onnx"))
    return folder


def change_provenance(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    provenance = content["versions"]["4"]["provenance"]
    content["versions"]["4"]["provenance"] = {
        key: value for key, value in (provenance | changes).items() if value is not None
    }
    (folder / "config.json").write_text(json.dumps(content))


def test_the_hash_is_checked(copied: Path) -> None:
    initialise(new_model(NUCLEI), str(copied))
    change_provenance(copied, weights={"sha256": "0" * 64})
    with pytest.raises(CheckpointError, match=r"weights\.pt has the SHA-256 .*config\.json has 0"):
        initialise(new_model(NUCLEI), str(copied))


@pytest.mark.parametrize("weights", [None, "weights.pt"])
def test_weights_that_config_json_does_not_describe_are_refused(
    copied: Path, weights: str | None
) -> None:
    change_provenance(copied, weights=weights)
    with pytest.raises(CheckpointError, match=r"4/weights\.pt is missing or not in .*--weights"):
        initialise(new_model(NUCLEI), str(copied))


def test_a_version_without_weights_is_refused(copied: Path) -> None:
    (copied / "4" / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match=r"4/weights\.pt is missing .*takes the checkpoint"):
        initialise(new_model(NUCLEI), str(copied))


def test_a_folder_without_a_valid_config_is_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        initialise(new_model(NUCLEI), str(tmp_path))
    (copied / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        initialise(new_model(NUCLEI), str(copied))


def test_only_plain_batch_norm_needs_statistics(tmp_path: Path) -> None:
    """A checkpoint that is not folded starts a network with either kind of batch norm."""
    config = TINY["light"]
    state = new_model(config, 2).state_dict()
    first = next(key for key in state if key.endswith(".running_var"))
    for scale, is_folded in ((1.0, True), (1.01, False)):
        state[first] = torch.full_like(state[first], scale)
        save_checkpoint(tmp_path / "a.pt", config, {"model": state, "ema": {}, "provenance": {}})
        initialise(new_model(with_norm(config, "frozen_bn"), 2), str(tmp_path / "a.pt"))
        plain = new_model(with_norm(config, "bn"), 2)
        if is_folded:
            with pytest.raises(CheckpointError, match="batch norm folded"):
                initialise(plain, str(tmp_path / "a.pt"))
        else:
            initialise(plain, str(tmp_path / "a.pt"))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports a tiny network with its weights when it is first needed."""
    root = tmp_path_factory.mktemp("published")

    def export(name: str) -> Path:
        if not (root / name).exists():
            save_tiny_checkpoint(root / f"{name}.pt", replace(TINY[name], name=name))
            command = [str(root / f"{name}.pt"), "--out", str(root), "--weights"]
            assert export_main(command) == 0
        return root / name

    return export


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_an_exported_network_has_the_weights_of_its_checkpoint(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = folder_of(name)
    model = new_model(TINY[name], 2)
    initialise(model, str(folder))
    expected = save_tiny_checkpoint(tmp_path / "same.pt", TINY[name]).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    config, _ = load_checkpoint(folder / "1" / "weights.pt")
    assert config == replace(TINY[name], name=name)
    provenance = json.loads((folder / "config.json").read_text())["versions"]["1"]["provenance"]
    size = (folder / "1" / "weights.pt").stat().st_size
    assert (provenance["weights"]["file"], provenance["weights"]["bytes"]) == ("weights.pt", size)


@pytest.mark.slow
def test_weights_are_exported_only_on_request(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "a.pt", replace(TINY["light"], name="light"))
    assert export_main([str(tmp_path / "a.pt"), "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "light" / "1" / "weights.pt").exists()
    config = json.loads((tmp_path / "light" / "config.json").read_text())
    assert "weights" not in config["versions"]["1"]["provenance"]
