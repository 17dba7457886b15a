from __future__ import annotations

import os
from pathlib import Path

import pytest

from service import cores


def test_the_count_is_at_least_one_and_at_most_the_affinity_mask() -> None:
    assert 1 <= cores.count_cores() <= len(os.sched_getaffinity(0))


def write_topology(root: Path, siblings: list[str]) -> None:
    for cpu, text in enumerate(siblings):
        folder = root / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")


@pytest.mark.parametrize(
    ("siblings", "quota", "expected"),
    [
        (["0,2", "1,3", "0,2", "1,3"], None, 2),
        (["0", "1", "2", "3"], None, 4),
        (["0", "1", "2", "3"], "150000 100000", 2),
        (["0", "1", "2", "3"], "max 100000", 4),
        (["0", "1"], "20000 100000", 1),
        ([], None, 4),
    ],
)
def test_hyper_threads_count_once_and_the_quota_is_a_limit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    siblings: list[str],
    quota: str | None,
    expected: int,
) -> None:
    write_topology(tmp_path / "cpu", siblings)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path / "cpu")
    monkeypatch.setattr(cores, "_CGROUP", tmp_path)
    count = len(siblings) or 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))
    assert cores.count_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("200000", 2)])
def test_cgroup_v1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path / "none")
    monkeypatch.setattr(cores, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert cores.count_cores() == expected
