"""What a checkpoint records of its training."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.tiny import TINY, build_tiny_data
from tests.training.test_train import command
from training.data.coco import CocoDataset
from training.data.digest import data_digest
from training.model.solo import Solo
from training.provenance import UNKNOWN, describe_training
from training.train import main
from training.weights.formats import load_provenance, save_checkpoint


def test_a_run_records_command_data_seed_and_steps(tmp_path: Path) -> None:
    root, out = build_tiny_data(tmp_path / "data"), tmp_path / "run"
    arguments = command(root, out, "--seed", "3", "--val-split", "")
    assert main(arguments) == 0
    training = load_provenance(out / "last.pt")["training"]
    assert training["command"].startswith("solo-train nuclei --data data --out run")
    assert (training["seed"], training["steps"]) == (3, 2)
    data = CocoDataset(root, "train")
    expected = {"split": "train", "images": 3, "objects": 4, "sha256": data_digest(data)}
    assert training["data"] == expected


def test_what_an_older_checkpoint_lacks_is_unknown(tmp_path: Path) -> None:
    model = Solo(TINY.model, 2)
    content = {"model": model.state_dict(), "ema": {}, "step": 7, "seconds": 5400.0}
    save_checkpoint(tmp_path / "last.pt", TINY, content)
    assert load_provenance(tmp_path / "last.pt") == {
        "training": {
            **dict.fromkeys(("command", "commit", "data", "seed"), UNKNOWN),
            "steps": 7,
            "hours": 1.5,
        }
    }


def test_a_checkpoint_without_a_training_has_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "a.pt", TINY, {"model": Solo(TINY.model, 2).state_dict(), "ema": {}})
    assert load_provenance(tmp_path / "a.pt") == {}


def test_a_command_that_is_not_known_is_unknown(tmp_path: Path) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    assert describe_training(data, "train", None)["command"] == UNKNOWN
