"""solo-train without a configuration, on data small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import CLASSES, build_tiny_data
from tests.support.tiny_solo import save_tiny_checkpoint, tiny_config
from training.configs.schema import Config
from training.configs.toml_files import load_config
from training.configure import name_of
from training.train import main
from training.weights.formats import load_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow network, whether EfficientNet-Lite0's weights are installed or not."""
    monkeypatch.setattr("training.configure.has_efficientnet", lambda: False)


def command(root: Path, out: Path, *more: str) -> list[str]:
    sizes = (
        *("model.backbone.base_width=8", "model.neck_channels=16", "model.head.channels=16"),
        *("model.head.num_convs=1", "model.head.norm_groups=4", "schedule.batch_size=2"),
        "schedule.epochs=2",
    )
    sets = [part for setting in sizes for part in ("--set", setting)]
    run = ["--data", str(root), "--out", str(out), "--workers", "0", "--val-split", ""]
    return [*run, "--hours", "0.00001", *sets, *more]


def test_the_configuration_is_written_with_its_reasons(
    root: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(command(root, tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "run" / "config.toml"
    config, content = load_checkpoint(tmp_path / "run" / "last.pt")
    assert load_config(str(file)) == config and content["step"] > 0
    assert config.classes == CLASSES and config.schedule.epochs == 2
    assert config.model.backbone.base_width == 8 and config.schedule.batch_size == 2
    reasons = [line for line in file.read_text().splitlines() if line.startswith("# ")]
    assert [line.split(":")[0] for line in reasons[:2]] == ["# data", "# input"]
    assert all(reason.removeprefix("# ") in printed for reason in reasons)


def test_a_later_start_resumes_what_was_chosen(root: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert main(command(root, out, "--max-hours", "0.0000001")) == 0
    _, stopped = load_checkpoint(out / "last.pt")
    written = (out / "config.toml").read_text()
    capsys.readouterr()
    assert main(command(root, out, "--hours", "5")) == 0
    printed = capsys.readouterr().out
    assert "chosen for" not in printed and f"{out / 'config.toml'} of an earlier start" in printed
    assert (out / "config.toml").read_text() == written
    _, finished = load_checkpoint(out / "last.pt")
    assert stopped["step"] == 1 < finished["step"]
    assert main(command(root, tmp_path / "whole")) == 0
    _, whole = load_checkpoint(tmp_path / "whole" / "last.pt")
    assert all(torch.equal(v, whole["model"][k]) for k, v in finished["model"].items())


def test_a_trained_model_with_other_classes(root: Path, tmp_path: Path, capsys: Any) -> None:
    save_tiny_checkpoint(tmp_path / "a.pt", tiny_config())
    run = command(root, tmp_path / "run")[:10]
    sets = ["--set", "schedule.batch_size=2", "--set", "schedule.epochs=1"]
    assert main([*run, *sets, "--init", str(tmp_path / "a.pt")]) == 0
    printed = capsys.readouterr().out
    assert "those of the trained model" in printed and "a.pt has disc, ring" in printed
    config, _ = load_checkpoint(tmp_path / "run" / "last.pt")
    assert config.model.head == tiny_config().model.head and config.classes == CLASSES


def test_an_edited_file_counts_and_a_restart_chooses_anew(
    root: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    base = 'base = "nuclei"\n[model.head]\nnum_grids = [8, 4, 2]\n'
    (out / "config.toml").write_text(f"{base}[schedule]\nepochs = 1\n")
    assert main(command(root, out)) == 0
    config, _ = load_checkpoint(out / "last.pt")
    assert config.model.head.num_grids == (8, 4, 2)
    assert main(command(root, out, "--restart")) == 0
    assert "chosen for" in capsys.readouterr().out
    restarted, _ = load_checkpoint(out / "last.pt")
    assert restarted.model.head.num_grids != (8, 4, 2)


def test_a_run_of_a_named_configuration_is_not_continued(
    root: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "last.pt").write_bytes(b"")
    assert main(command(root, tmp_path)) == 1
    assert "has a checkpoint of a named configuration" in capsys.readouterr().err
    assert not (tmp_path / "config.toml").exists()


def test_data_without_objects_is_one_line(tmp_path: Path, root: Path, capsys: Any) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").symlink_to(root / "images")
    content = json.loads((root / "annotations" / "train.json").read_text())
    file = tmp_path / "annotations" / "train.json"
    file.write_text(json.dumps({**content, "annotations": []}))
    assert main(command(tmp_path, tmp_path / "run")) == 1
    printed = capsys.readouterr().err
    assert "no objects" in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("leaves", "leaves"),
        ("nuclei", "nuclei_auto"),
        ("my data (2)", "my-data-2-"),
        ("_.x", "x"),
        ("日本", "model"),
    ],
)
def test_names_of_folders(folder: str, name: str, tmp_path: Path) -> None:
    assert name_of(tmp_path / folder) == name
    assert Config(name=name).name == name
