from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from service import cores
from tests.support.tiny import CLASSES, build_tiny_data
from training.configs import get_config
from training.configs.schema import Config
from training.configs.tables import get_table
from training.options import build_parser, choose_workers
from training.train import build_config, main
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
    printed = capsys.readouterr().out
    assert f"checkpoint: {tmp_path / 'last.pt'}" in printed
    assert (
        f"publish it: solo-export {tmp_path / 'best.pt'} --out model_repo --data {root}" in printed
    )
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


@pytest.mark.parametrize("what", [["nuclei"], [], ["--table", "5"]])
def test_an_output_folder_that_cannot_be_written_is_found_before_the_data_is_read(
    what: list[str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    assert main([*what, "--data", str(tmp_path / "none"), "--out", str(out)]) == 1
    assert str(out) in (message := capsys.readouterr().err) and "none" not in message
    assert main([*what, "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")]) == 1
    assert "none" in capsys.readouterr().err


def test_a_run_without_validation_stops_in_time(root: Path, tmp_path: Path) -> None:
    assert main(command(root, tmp_path, "--val-split", "", "--max-hours", "1e-9")) == 0
    assert load_checkpoint(tmp_path / "last.pt")[1]["step"] == 1
    assert not (tmp_path / "best.pt").exists()


def test_a_table_is_trained_printed_and_not_repeated(
    root: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["--table", "5", "--base", *command(root, tmp_path, "--row", "focal")]
    assert main([*arguments, "--max-hours", "1e-9"]) == 1
    assert "step 1 of 2; the same command resumes it" in capsys.readouterr().err
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| focal |" in printed and "| 31.6 |" in printed
    assert f"table 5, focal, seed 0: {tmp_path}" in printed
    (result,) = tmp_path.glob("5-focal-*/seed0/result.json")
    assert (result.parent / "best.pt").exists()  # rows are validated while they are trained
    content = json.loads(result.read_text())
    assert content["config"]["loss"]["mask_loss"] == "focal"
    assert 0 <= content["metrics"]["AP"] <= 1 and content["fps"] > 0
    assert content["evaluation"]["max_dets"] == 100 and content["evaluation"]["split"] == "val"
    written = result.stat().st_mtime_ns
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert again in printed and "seed 0:" not in again  # the table alone
    assert result.stat().st_mtime_ns == written
    # Another limit of detections evaluates the same weights again.
    weights = load_checkpoint(result.parent / "last.pt")[1]["model"]
    assert main([*arguments, "--max-dets", "7"]) == 0
    assert "at most 7 detections per image" in capsys.readouterr().out
    same = load_checkpoint(result.parent / "last.pt")[1]["model"]
    assert all(torch.equal(value, same[key]) for key, value in weights.items())
    assert json.loads(result.read_text())["evaluation"]["max_dets"] == 7
    # What the weights depend on gives another run.
    for more in (["--precision", "bf16"], ["--recipe", "paper"], ["--accumulate", "2"]):
        assert main([*arguments, *more]) == 0
    assert len(list(tmp_path.glob("5-focal-*/seed0/result.json"))) == 4
    assert main([*arguments, "--restart"]) == 0
    assert "seed 0:" in capsys.readouterr().out
    assert len(list(tmp_path.glob("5-focal-*"))) == 4


def test_the_command_line_takes_precedence_over_the_rows_or_is_refused(
    root: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["--table", "1", "--base", *command(root, tmp_path, "--row", "SOLO R50")]
    arguments += ["--set", "schedule.epochs=1"]  # the row has 72
    assert main(arguments) == 0
    (path,) = tmp_path.glob("1-solo-r50-*/seed0/last.pt")
    config, content = load_checkpoint(path)
    assert (config.schedule.epochs, content["step"]) == (1, 1)
    assert main([*arguments, "--set", "model.backbone.depth=18"]) == 1
    error = capsys.readouterr().err
    assert "--set model.backbone.depth=18 changes model.backbone.depth" in error
    assert "table 1" in error


def test_the_options_change_every_row() -> None:
    arguments = ["--table", "6", "--data", "x", "--schedule", "1x", "--recipe", "paper"]
    options = build_parser().parse_args([*arguments, "--set", "schedule.lr=1"])
    for row in get_table("6").rows:
        config = build_config("solo_r50", options, row.change)
        assert (config.schedule.epochs, config.schedule.lr) == (12, 1)
        small = "512" in row.name
        assert config.augment.short_sides == ((410, 512) if small else (640, 800))


def test_random_weights_are_not_frozen(root: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = command(root, tmp_path, "--set", "model.backbone.frozen_stages=1")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "1 frozen stages" in error and "--init imagenet" in error
    assert main([*arguments, "--set", "model.backbone.norm=frozen_bn"]) == 1
    assert "1 frozen stages and frozen batch norm" in capsys.readouterr().err
    assert not (tmp_path / "last.pt").exists()


def test_a_split_without_annotations_is_no_validation_split(
    root: Path, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "data"
    shutil.copytree(root, data)
    content = json.loads((data / "annotations" / "val.json").read_text())
    del content["annotations"]
    (data / "annotations" / "test-dev.json").write_text(json.dumps(content))
    for what in (["nuclei"], ["--table", "5", "--base", "nuclei"]):
        options = ["--data", str(data), "--val-split", "test-dev", "--out", str(tmp_path / "run")]
        assert main([*what, *options]) == 1
        assert "--val-split test-dev" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "processes", "expected"),
    [
        (["--workers", "3"], None, 3),
        ([], None, 1),
        (["--device", "cuda:1"], None, 8),
        (["--device", "cuda:1"], "4", 3),
        (["--device", "cuda:1"], "64", 1),
    ],
)
def test_the_data_loading_processes_fit_the_machine(
    arguments: list[str], processes: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.options.count_cores", lambda: 12)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    options = build_parser().parse_args(["nuclei", "--data", "x", *arguments])
    assert choose_workers(options) == expected


def test_the_data_loading_processes_fit_the_quota_of_cpu_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path / "none")
    monkeypatch.setattr(cores, "_CGROUP", tmp_path)
    monkeypatch.setattr(cores, "_OWN_CGROUP", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    options = build_parser().parse_args(["nuclei", "--data", "x", "--device", "cuda"])
    assert choose_workers(options) == 3


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
        (["--data", "DATA", "--hours", "0"], "--hours is 0"),
        (["--data", "DATA", "--hours", "nan"], "--hours is nan"),
        (["--data", "DATA", "--scale-lr"], "--scale-lr"),
        (["--data", "DATA", "--schedule", "1x"], "--schedule"),
        (["--data", "DATA", "--set", "schedule.learning_rate=1"], "learning_rate=1"),
        (["nuclei", "--data", "DATA", "--hours", "1"], "--hours is for runs without"),
        (["--table", "4", "--data", "DATA", "--hours", "1"], "--hours is for runs without"),
        (["nuclei", "--table", "4", "--data", "DATA"], "either a configuration or --table"),
        (["--table", "9", "--data", "DATA"], "no table '9'"),
        (["--table", "3", "--data", "DATA"], "no table '3' with results"),
        (["--table", "6", "--row", "x", "--data", "DATA"], "no row 'x'"),
        (
            ["--table", "6", "--set", "model.head=1", "--data", "DATA"],
            "model.head: Input should be",
        ),
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


def test_a_configuration_from_a_toml_file(root: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "leaves.toml"
    file.write_text('base = "nuclei"\n[schedule]\nlr = 0.5\n')
    arguments = command(root, tmp_path / "run", "--val-split", "")
    arguments[0] = str(file)
    assert main(arguments) == 0
    config, _ = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (config.name, config.schedule.lr, config.schedule.epochs) == ("leaves", 0.5, 2)
    file.write_text('base = "nuclei"\n[schedule]\nrate = 0.5\n')
    assert main(arguments) == 1
    assert f"solo-train: {file}: " in (printed := capsys.readouterr().err)
    assert "schedule.rate" in printed
