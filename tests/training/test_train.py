from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import CLASSES, build_tiny_data
from training.configs import get_config
from training.configs.schema import Config
from training.train import build_config, build_parser, main
from training.weights.formats import load_checkpoint

SMALL = [
    "model.backbone.base_width=8",
    "model.neck_channels=16",
    "model.head.channels=16",
    "model.head.num_convs=1",
    "model.head.norm_groups=4",
    "model.head.num_grids=[8,4,2]",
    "model.candidates=20",
    "input.resize.scale=1",
    "input.resize.tile_hw=[64,64]",
    "input.resize.overlap_px=16",
    "schedule.batch_size=2",
    "schedule.epochs=2",
    "schedule.warmup_steps=1",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_data(tmp_path_factory.mktemp("data"))


def command(root: Path, out: Path, *more: str) -> list[str]:
    sets = [part for setting in SMALL for part in ("--set", setting)]
    return ["nuclei", "--data", str(root), "--out", str(out), "--workers", "0", *sets, *more]


def test_a_small_run_from_command_to_checkpoint(root: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = command(root, tmp_path, "--validate-every", "1", "--checkpoint-every", "1")
    assert main(arguments) == 0
    assert f"checkpoint: {tmp_path / 'last.pt'}" in capsys.readouterr().out
    config, content = load_checkpoint(tmp_path / "last.pt")
    assert config.name == "nuclei" and config.num_classes == 2 and config.classes == CLASSES
    assert config.model.head.num_grids == (8, 4, 2)
    assert content["step"] == 2 and content["ema"]
    assert (tmp_path / "best.pt").exists()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        names = {row[1] for row in csv.reader(file)}
    assert "val/AP" in names and "val/AP50" in names
    # The same command again finds the run finished; other settings are applied or refused by name.
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--set", "model.candidates=21"]) == 1
    assert "model.candidates 21 (was 20)" in capsys.readouterr().err
    assert main([*arguments, "--set", "schedule.epochs=3", "--resume-with", "schedule.lr=1"]) == 0
    printed = capsys.readouterr().out
    assert "schedule.epochs 3 (was 2)" in printed and "schedule.lr 1.0 (was" in printed
    config, content = load_checkpoint(tmp_path / "last.pt")
    assert (content["step"], config.schedule.epochs, config.schedule.lr) == (3, 3, 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["schedule.lr=1"], "last.pt is missing"),
        (["schedule.lr=1", "--restart"], "not possible with --restart"),
        (["schedule.batch_size=4"], "schedule.batch_size cannot change in a resumed run, only"),
        (["schedule.lrx=1"], "schedule.lrx cannot change"),
        (["losses.x=1"], "losses.x cannot change"),
        (["loss.x=1"], "'loss.x=1' is not FIELD=VALUE"),
        (["schedule.lr=fast"], "schedule.lr"),
    ],
)
def test_what_a_resumed_run_cannot_change(
    more: list[str], message: str, root: Path, tmp_path: Path, capsys: Any
) -> None:
    if "missing" not in message:
        (tmp_path / "last.pt").write_bytes(b"is not read")
    assert main(command(root, tmp_path, "--resume-with", *more)) == 1
    assert message in capsys.readouterr().err


def test_a_run_without_validation_stops_in_time(root: Path, tmp_path: Path) -> None:
    assert main(command(root, tmp_path, "--val-split", "", "--max-hours", "1e-9")) == 0
    assert load_checkpoint(tmp_path / "last.pt")[1]["step"] == 1
    assert not (tmp_path / "best.pt").exists()


def test_a_table_is_trained_printed_and_not_repeated(
    root: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["--table", "4", "--base", *command(root, tmp_path, "--row", "focal")]
    assert main([*arguments, "--max-hours", "1e-9"]) == 1
    assert "step 1 of 2; the same command resumes it" in capsys.readouterr().err
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| focal |" in printed and "| 31.6 |" in printed
    (result,) = tmp_path.glob("nuclei-*/seed0/result.json")
    content = json.loads(result.read_text())
    assert content["config"]["loss"]["mask_loss"] == "focal"
    assert 0 <= content["metrics"]["AP"] <= 1
    written = result.stat().st_mtime_ns
    assert main(arguments) == 0
    assert capsys.readouterr().out == printed and result.stat().st_mtime_ns == written


def test_the_paper_recipe_from_the_command_line(root: Path, tmp_path: Path) -> None:
    arguments = command(root, tmp_path, "--recipe", "paper", "--set", "model.head.kind=vanilla")
    assert main(arguments) == 0
    config = load_checkpoint(tmp_path / "last.pt")[0]
    assert (config.model.recipe, config.targets.recipe) == ("paper", "paper")
    assert config.postprocess.nms.kind == "mask"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solo_r51", "--data", "DATA"], "'solo_r51'"),
        (["nuclei", "--data", "nowhere"], "nowhere"),
        (["nuclei", "--data", "DATA", "--train-split", "test"], "'test'"),
        (["nuclei", "--data", "DATA", "--val-split", "test"], "'test'"),
        (["nuclei", "--data", "DATA", "--set", "schedule.learning_rate=1"], "learning_rate=1"),
        (["nuclei", "--data", "DATA", "--set", "model.head.num_grids=[1]"], "num_grids=[1]"),
        (["--data", "DATA"], "either a configuration or --table"),
        (["nuclei", "--table", "4", "--data", "DATA"], "either a configuration or --table"),
        (["--table", "9", "--data", "DATA"], "no table '9'"),
        (["--table", "4", "--base", "solo", "--data", "DATA"], "'solo'"),
        (["--table", "4", "--data", "DATA", "--val-split", ""], "validation split"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, root: Path, tmp_path: Path, capsys: Any
) -> None:
    filled = [str(root) if a == "DATA" else a for a in arguments]
    assert main([*filled, "--out", str(tmp_path / "run"), "--workers", "0"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("solo-train: ") and message in printed
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_one_line(root: Path, tmp_path: Path, capsys: Any) -> None:
    sets = ["--set", "loss.mask_weight=Infinity", "--val-split", ""]
    assert main(command(root, tmp_path, *sets)) == 1
    assert "loss is" in capsys.readouterr().err


def test_options_that_change_the_configuration() -> None:
    def config_of(*arguments: str) -> Config:
        options = build_parser().parse_args(["solo_r50", "--data", "x", *arguments])
        return build_config("solo_r50", options)

    assert config_of() == get_config("solo_r50")
    assert config_of("--schedule", "1x").schedule.milestones == (8, 11)
    larger = ["--set", "schedule.batch_size=64"]
    assert config_of(*larger).schedule.lr == 0.01
    assert config_of(*larger, "--scale-lr").schedule.lr == pytest.approx(0.04)
    assert config_of("--schedule", "6x", "--set", "schedule.epochs=5").schedule.epochs == 5


def test_the_help_names_the_configurations() -> None:
    text = build_parser().format_help()
    assert "nuclei" in text and "decoupled_solo_light_r50" in text and "--max-hours" in text
