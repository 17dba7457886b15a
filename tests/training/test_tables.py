from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training.configs import get_config
from training.configs.io import apply_overrides
from training.configs.schema import Config
from training.configs.tables import Change, Table, TableRow, get_table
from training.tables import (
    METRICS,
    RunResult,
    TablePlan,
    format_table,
    run_table,
    select_rows,
)

BASE = get_config("nuclei_ablation")
EVALUATION = {"split": "val", "max_dets": 100}


class Training:
    """Stands for the training of a row: notes what was asked, answers with numbers of the seed."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.runs: list[tuple[str, int]] = []
        self.labels: list[str] = []
        self.folders: list[Path] = []
        self.fail_at = fail_at

    def __call__(self, config: Config, folder: Path, seed: int, label: str) -> RunResult:
        if len(self.runs) == self.fail_at:
            raise ValueError("out of time")
        self.runs.append((config.loss.mask_loss, seed))
        self.labels.append(label)
        self.folders.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "last.pt").touch()
        ap = {"bce": 0.3, "focal": 0.32, "dice": 0.36}[config.loss.mask_loss] + 0.01 * seed
        return RunResult(dict.fromkeys(METRICS, ap), 10.0 + seed, "a device")


def plan(train: Training, base: Config = BASE, **changes: Any) -> TablePlan:
    def configure(change: Change) -> Config:
        return change(base)

    return replace(TablePlan(configure, {"data": "x"}, EVALUATION, train), **changes)


def test_a_table_beside_the_papers_numbers(tmp_path: Path) -> None:
    training = Training()
    text = run_table(get_table("5"), plan(training), tmp_path, seeds=(0, 2))
    assert training.runs == [(k, s) for s in (0, 2) for k in ("bce", "focal", "dice")]
    assert training.labels[4] == "table 5, focal, seed 2"
    assert [f.parent.name.rpartition("-")[0] for f in training.folders[:3]] == [
        *("5-bce", "5-focal", "5-dice")
    ]
    lines = text.splitlines()
    assert lines[:3] == [
        "Table 5: mask loss",
        "Paper: 3x schedule, val2017, at most 100 detections per image.",
        "Here: val, at most 100 detections per image.",
    ]
    header = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert header[1] == "AP (val)" and header[7] == "paper AP (val2017)"
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    # 36 and 38: the mean is 37, the sample standard deviation the root of 2.
    assert cells[:2] == ["Dice", "37.0 ± 1.4"]
    assert cells[7:] == ["35.8", "57.1", "37.8", "15.0", "38.7", "53.6"]
    assert all(line.count("|") == lines[4].count("|") for line in lines[4:])
    assert (tmp_path / "table_5.md").read_text() == text + "\n"


def test_the_speed_is_beside_the_papers_where_the_paper_has_it(tmp_path: Path) -> None:
    base = get_config("solo_r50")
    text = run_table(get_table("6"), plan(Training(), base), tmp_path)
    lines = text.splitlines()
    assert "fps on a V100" in lines[1] and "fps on a device" in lines[2]
    assert lines[4].endswith(
        "| fps (here) | paper AP (val2017) | paper AP50 (val2017) "
        "| paper AP75 (val2017) | paper fps |"
    )
    assert lines[6].endswith("| 10.0 | 36.0 | 57.5 | 38.0 | 12.1 |")
    assert "fps" not in run_table(get_table("5"), plan(Training(), base), tmp_path)


def test_the_main_table_tells_the_splits_apart(tmp_path: Path) -> None:
    text = run_table(get_table("1"), plan(Training(), get_config("solo_r50")), tmp_path)
    assert "| AP (val) |" in text and "| paper AP (test-dev) |" in text
    assert text.startswith("Table 1: main results\nPaper: 6x schedule, test-dev")


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out of time"):
        run_table(get_table("5"), plan(Training(fail_at=2)), tmp_path)
    assert (tmp_path / "table_5.md").read_text().count("\n") == 8  # the two rows that are done
    again = Training()
    run_table(get_table("5"), plan(again), tmp_path)
    assert again.runs == [("dice", 0)]
    # Another table shares the row, another seed and another base do not.
    shared = Training()
    run_table(get_table("4"), plan(shared), tmp_path, rows=["1 CoordConv"])
    assert shared.runs == []
    run_table(get_table("5"), plan(shared), tmp_path, rows=["Dice"], seeds=[1])
    run_table(get_table("5"), plan(shared, get_config("nuclei")), tmp_path, rows=["BCE"])
    assert shared.runs == [("dice", 1), ("bce", 0)]
    assert shared.folders[0].parent == again.folders[0].parent


@pytest.mark.parametrize(
    "training",
    [{"data": "y"}, {"data": "x", "init": "imagenet"}, {"data": "x", "precision": "bf16"}],
)
def test_another_training_is_another_run(tmp_path: Path, training: dict[str, str]) -> None:
    first, second = Training(), Training()
    run_table(get_table("5"), plan(first), tmp_path, rows=["Dice"])
    run_table(get_table("5"), plan(second, training=training), tmp_path, rows=["Dice"])
    assert second.runs == first.runs and second.folders != first.folders
    (path,) = second.folders[0].glob("result.json")
    assert json.loads(path.read_text())["training"] == {"code_version": 1, **training}


def test_another_evaluation_is_made_in_the_same_folder(tmp_path: Path) -> None:
    first, second = Training(), Training()
    run_table(get_table("5"), plan(first), tmp_path, rows=["Dice"])
    other = {**EVALUATION, "max_dets": 500}
    text = run_table(get_table("5"), plan(second, evaluation=other), tmp_path, rows=["Dice"])
    assert second.folders == first.folders and "at most 500 detections" in text
    assert (first.folders[0] / "last.pt").exists()  # the weights are those of the first run


def test_a_restart_forgets_the_finished_run(tmp_path: Path) -> None:
    first = Training()
    run_table(get_table("5"), plan(first), tmp_path, rows=["Dice"])
    with pytest.raises(ValueError, match="out of time"):
        run_table(get_table("5"), plan(Training(fail_at=0), restart=True), tmp_path, rows=["Dice"])
    # Nothing of the first run is taken for the second one, not even after an interruption.
    assert list(first.folders[0].iterdir()) == []
    again = Training()
    run_table(get_table("5"), plan(again), tmp_path, rows=["Dice"])
    assert again.runs == first.runs and again.folders == first.folders


def test_the_name_of_a_row_follows_from_all_that_it_says() -> None:
    rows = get_table("5").rows
    table = plan(Training())
    names = [table.row_config(row).name for row in rows]
    assert len(set(names)) == 3 and all(n.startswith("nuclei_ablation-") for n in names)
    same = table.row_config(get_table("2").rows[-1])
    assert same.name == names[2]


def test_a_configuration_that_does_not_fit_a_row_names_the_row(tmp_path: Path) -> None:
    def configure(change: Change) -> Config:
        return apply_overrides(change(BASE), ["model.head.level_strides=[8]"])

    training = Training()
    with pytest.raises(ValueError, match=r"row 'Dice': .*level_strides"):
        run_table(get_table("5"), plan(training, configure=configure), tmp_path, rows=["Dice"])
    assert training.runs == []


def test_a_row_without_numbers_in_the_paper_or_in_the_results() -> None:
    rows = (TableRow(name="a", change=lambda c: c), TableRow(name="b", change=lambda c: c))
    table = Table(key="x", title="t", rows=rows, note="n")
    result = RunResult({**dict.fromkeys(METRICS, 0.1234), "APl": -1.0}, 1.0, "cpu")
    text = format_table(table, rows, {"a": [result], "b": []}, split="val", max_dets=100)
    assert text.splitlines()[-1] == f"| a |{' 12.3 |' * 5} - |" and "| b |" not in text


def test_rows_and_seeds_are_checked(tmp_path: Path) -> None:
    table = get_table("5")
    assert [row.name for row in select_rows(table, ["Dice", "BCE"])] == ["Dice", "BCE"]
    with pytest.raises(ValueError, match="table 5 has no row 'dice'; it has BCE, focal, Dice"):
        select_rows(table, ["dice"])
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match="seeds are"):
            run_table(table, plan(Training()), tmp_path, seeds=seeds)
