"""Recording a version's evaluation, and repeating it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.models.repository import read_config
from tests.support.blob_model import publish
from tests.support.tiny import annotation_of, disc, write_image
from training.evaluate import main
from training.reproduce import NotReproduced, compare_measured

HW = (64, 80)
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Red discs, of which the second image has one that is labelled and not drawn."""
    root, annotations, images = tmp_path / "data", [], []
    for number in (1, 2):
        masks = [disc(*HW, 30, 20 * number, 9), disc(*HW, 50, 60, 6)]
        picture = masks[0][..., None] * (250, 0, 0)
        write_image(root / "images" / f"{number}.png", picture.astype("uint8"))
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 80})
        annotations += [annotation_of(mask, number, 10) for mask in masks[:number]]
    content = {
        "images": images,
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
        "categories": [{"id": 10, "name": "red"}],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "val.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def recorded(data: Path, tmp_path: Path) -> Path:
    folder = publish(tmp_path / "repo")
    arguments = [str(folder), "--data", str(data), "--max-dets", "7", "--record"]
    assert main([*arguments, "--score-threshold", "0.4"]) == 0
    return folder


def _edit(folder: Path, change: Change) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content["versions"]["1"]["provenance"]["measured"])
    (folder / "config.json").write_text(json.dumps(content))


def test_the_evaluation_is_stored_with_the_hash_of_its_data(recorded: Path) -> None:
    provenance = read_config(recorded).provenance
    measured = provenance["measured"]
    assert provenance["made_by"] == "tests"
    assert (measured["images"], measured["objects"], measured["split"]) == (2, 3, "val")
    assert (measured["max_dets"], measured["score_threshold"]) == (7, 0.4)
    assert measured["F1_50"] == pytest.approx(0.8) and len(measured["sha256"]) == 64
    lines = (recorded / "1" / "evaluation.csv").read_text().splitlines()
    assert lines[0].startswith("file_name,labelled,found") and lines[2].startswith("2.png,2,1,")


@pytest.mark.parametrize("with_version", [False, True])
def test_the_same_numbers_are_found_again(
    recorded: Path, data: Path, with_version: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recorded / "1" if with_version else recorded
    assert main(["--reproduce", str(folder), "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "F1_50 stated 0.8000, found 0.8000" in printed and "scores from 0.4" in printed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(AP=m["AP"] + 0.01), "not reproduced within 0.002: AP "),
        (lambda m: m.update(sha256="0" * 64), "the data differ"),
        (lambda m: m.pop("sha256"), "states no sha256"),
        (lambda m: m.update(count_MAE=0.9), "count_MAE 0.9000 is 0.5000"),
    ],
)
def test_what_differs_is_an_error(
    recorded: Path, data: Path, change: Change, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _edit(recorded, change)
    assert main(["--reproduce", str(recorded), "--data", str(data)]) == 1
    error = capsys.readouterr().err
    assert reason in error and error.splitlines()[-1].startswith("solo-eval: ")


def test_changed_data_are_noticed_before_the_prediction(
    recorded: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data / "annotations" / "val.json"
    content = json.loads(path.read_text())
    del content["annotations"][-1]
    path.write_text(json.dumps(content))
    assert main(["--reproduce", str(recorded), "--data", str(data)]) == 1
    printed = capsys.readouterr()
    assert "the data differ" in printed.err and "'objects': 2" in printed.err
    assert "image/s" not in printed.err and not printed.out


def test_a_version_without_an_evaluation_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--reproduce", str(publish(tmp_path / "repo")), "--data", str(data)]) == 1
    assert "states no split, sha256, max_dets, score_threshold" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--record", "--reproduce"])
def test_only_folders_of_models_can_be_recorded(
    flag: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flag, "http://127.0.0.1:9", "--data", str(data)]) == 1
    assert f"{flag} needs a folder" in capsys.readouterr().err


def test_the_evaluation_of_the_served_instances_is_recorded(data: Path, tmp_path: Path) -> None:
    folder = publish(tmp_path / "repo")
    assert main([str(folder), "--data", str(data), "--record"]) == 0
    measured = read_config(folder).provenance["measured"]
    assert (measured["max_dets"], measured["score_threshold"]) == (100, 0.1)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--record", "--ground-truth-masks"], "not possible with --ground-truth-masks"),
        (["--score-threshold", "1.5"], "--score-threshold 1.5 is not in 0..1"),
        (["--score-threshold", "nan"], "nan is not in 0..1"),
        (["--sizes", "64", "0"], "--sizes 64 0: areas are at least 1 px2"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    more: list[str], reason: str, recorded: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (recorded / "config.json").read_bytes()
    assert main([str(recorded), "--data", str(data), *more]) == 1
    assert reason in capsys.readouterr().err
    assert (recorded / "config.json").read_bytes() == before


def test_the_tolerance_is_absolute_for_shares_and_relative_for_counts() -> None:
    stated = {"AP": 0.5, "count_MAE": 40.0}
    assert len(compare_measured(stated, {"AP": 0.5009, "count_MAE": 40.03}, 0.001)) == 2
    for found in ({"AP": 0.5011, "count_MAE": 40.0}, {"AP": 0.5, "count_MAE": 40.05}):
        with pytest.raises(NotReproduced, match="not reproduced"):
            compare_measured(stated, found, 0.001)


@pytest.mark.parametrize("found", [{}, {"AP": float("nan")}])
def test_a_metric_that_is_missing_or_undefined_is_not_reproduced(found: dict[str, float]) -> None:
    with pytest.raises(NotReproduced, match=r"AP 0\.5000 is"):
        compare_measured({"AP": 0.5}, found)
    with pytest.raises(NotReproduced, match="no metric is stated"):
        compare_measured({}, {"AP": 0.5})


def test_the_metrics_of_each_class_are_compared() -> None:
    stated = {"AP": 0.5, "classes": {"disc": {"AP": 0.4, "AP50": 0.6}, "box": {"AP50": 0.6}}}
    found = {"AP": 0.5, "classes": {"disc": {"AP": 0.4, "AP50": 0.6}, "box": {"AP50": 0.7}}}
    with pytest.raises(NotReproduced, match=r"AP50 of box 0\.6000 is 0\.7000$"):
        compare_measured(stated, found)
