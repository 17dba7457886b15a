from __future__ import annotations

from pathlib import Path

import pytest

from training.configs import get_config
from training.configs.schema import Config
from training.configs.tables import Table, TableRow, get_table
from training.tables import METRICS, format_table, row_config, run_table, select_rows

BASE = get_config("nuclei_ablation")


class Training:
    """Stands for the training of a row: notes what was asked, answers with numbers of the seed."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.runs: list[tuple[str, int]] = []
        self.fail_at = fail_at

    def __call__(self, config: Config, folder: Path, seed: int) -> dict[str, float]:
        if len(self.runs) == self.fail_at:
            raise ValueError("out of time")
        self.runs.append((config.loss.mask_loss, seed))
        ap = {"bce": 0.3, "focal": 0.32, "dice": 0.36}[config.loss.mask_loss] + 0.01 * seed
        return dict.fromkeys(METRICS, ap)


def test_a_table_beside_the_papers_numbers(tmp_path: Path) -> None:
    training = Training()
    text = run_table(get_table("4"), BASE, tmp_path, seeds=(0, 2), train_one=training)
    assert training.runs == [(k, s) for s in (0, 2) for k in ("bce", "focal", "dice")]
    lines = text.splitlines()
    assert lines[0] == "Table 4: mask loss (paper: 3x schedule, val2017)"
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    # 36 and 38: the mean is 37, the sample standard deviation the root of 2.
    assert cells[:2] == ["Dice", "37.0 ± 1.4"]
    assert cells[7:] == ["35.8", "57.1", "37.8", "15.0", "38.7", "53.6"]
    assert all(line.count("|") == lines[2].count("|") for line in lines[2:])
    assert (tmp_path / "table_4.md").read_text() == text + "\n"


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out of time"):
        run_table(get_table("4"), BASE, tmp_path, train_one=Training(fail_at=2))
    assert (tmp_path / "table_4.md").read_text().count("\n") == 6  # the two rows that are done
    again = Training()
    run_table(get_table("4"), BASE, tmp_path, train_one=again)
    assert again.runs == [("dice", 0)]
    # Another table shares the row, another seed and another base do not.
    shared = Training()
    run_table(get_table("3"), BASE, tmp_path, rows=["1 CoordConv"], train_one=shared)
    assert shared.runs == []
    run_table(get_table("4"), BASE, tmp_path, rows=["Dice"], seeds=[1], train_one=shared)
    run_table(get_table("4"), get_config("nuclei"), tmp_path, rows=["BCE"], train_one=shared)
    assert shared.runs == [("dice", 1), ("bce", 0)]


def test_the_name_of_a_row_follows_from_all_that_it_says() -> None:
    rows = get_table("4").rows
    names = [row_config(row, BASE).name for row in rows]
    assert len(set(names)) == 3 and all(n.startswith("nuclei_ablation-") for n in names)
    same = row_config(get_table("2").rows[-1], BASE)
    assert same.name == names[2]


def test_a_row_without_numbers_in_the_paper_or_in_the_results() -> None:
    rows = (TableRow(name="a", change=lambda c: c), TableRow(name="b", change=lambda c: c))
    table = Table(key="x", title="t", rows=rows, note="n")
    metrics = {**dict.fromkeys(METRICS, 0.1234), "APl": -1.0}
    text = format_table(table, rows, {"a": [metrics], "b": []})
    assert text.splitlines()[-1] == f"| a |{' 12.3 |' * 5} - |  |" and "| b |" not in text


def test_rows_and_seeds_are_checked(tmp_path: Path) -> None:
    table = get_table("4")
    assert [row.name for row in select_rows(table, ["Dice", "BCE"])] == ["Dice", "BCE"]
    with pytest.raises(ValueError, match="table 4 has no row 'dice'; it has BCE, focal, Dice"):
        select_rows(table, ["dice"])
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match="seeds are"):
            run_table(table, BASE, tmp_path, seeds=seeds, train_one=Training())
