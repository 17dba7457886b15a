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
from training.precision import PRECISION_FILE
from training.train import main
from training.trainer import Trainer
from training.weights.formats import load_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow network and float32, whatever is installed and whatever the CPU can do."""
    monkeypatch.setattr("training.configure.has_efficientnet", lambda: False)
    monkeypatch.setattr("training.precision.has_native_bf16", lambda device: False)


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


def faster_in(precision: str) -> Any:
    """Stands for `measure_step`; a step in `precision` takes 1 s, any other 2 s."""
    return lambda trainer: 1.0 if trainer.options.precision == precision else 2.0


def test_bf16_is_chosen_where_it_is_faster_and_kept_on_a_machine_without_it(
    root: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.precision.has_native_bf16", lambda device: True)
    monkeypatch.setattr("training.train.measure_step", faster_in("bf16"))
    trained: list[tuple[str, bool]] = []
    fit = Trainer.fit

    def recorded(trainer: Trainer) -> Path:
        trained.append((trainer.options.precision, trainer.options.channels_last))
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", recorded)
    out = tmp_path / "run"
    assert main(command(root, out, "--max-hours", "0.0000001")) == 0
    reason = "precision: bf16, because a step takes 1 s in bf16 with channels-last layout and 2 s"
    assert reason in capsys.readouterr().out and reason in (out / "config.toml").read_text()
    assert "at 1.00 s for" in (out / "config.toml").read_text()  # the schedule counts on it
    monkeypatch.setattr("training.precision.has_native_bf16", lambda device: False)
    assert main(command(root, out)) == 0
    assert f"precision: that of {out / PRECISION_FILE}: bf16" in capsys.readouterr().out
    assert main(command(root, tmp_path / "given", "--precision", "fp32")) == 0
    assert "precision: fp32, as given" in capsys.readouterr().out
    named = ["nuclei", *command(root, tmp_path / "named", "--precision", "auto")]
    del named[named.index("--hours") : named.index("--hours") + 2]
    assert main(named) == 0
    assert "precision: fp32, because" in capsys.readouterr().out
    assert main(named[: named.index("--precision")]) == 0
    assert trained == [("bf16", True)] * 2 + [("fp32", False)] * 3
    assert load_checkpoint(out / "last.pt")[1]["step"] > 1


def test_the_size_of_the_validation_is_among_the_reasons(
    root: Path, tmp_path: Path, capsys: Any
) -> None:
    run = command(root, tmp_path / "run")
    del run[run.index("--val-split") : run.index("--val-split") + 2]
    assert main([*run, "--max-hours", "0.0000001"]) == 0
    capsys.readouterr()
    reasons = (tmp_path / "run" / "config.toml").read_text()
    assert "# validation: 3 images with 4 objects; that is few" in reasons
    assert main(run) == 0  # a later start says it too
    assert "solo-train: validation: 3 images with 4 objects; " in capsys.readouterr().err


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


def test_data_without_objects_is_refused(tmp_path: Path, root: Path, capsys: Any) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").symlink_to(root / "images")
    content = json.loads((root / "annotations" / "train.json").read_text())
    file = tmp_path / "annotations" / "train.json"
    file.write_text(json.dumps({**content, "annotations": []}))
    assert main(command(tmp_path, tmp_path / "run")) == 1
    warning, refusal = capsys.readouterr().err.splitlines()
    assert "train.json: no image has an object" in warning
    assert "the training images have no objects" in refusal


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
