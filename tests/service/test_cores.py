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
    monkeypatch.setattr(cores, "_OWN_CGROUP", tmp_path / "none")
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
    monkeypatch.setattr(cores, "_OWN_CGROUP", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert cores.count_cores() == expected


@pytest.mark.parametrize(
    ("own", "quotas", "expected"),
    [
        ("0::/system.slice/solo.service\n", {"system.slice/solo.service/cpu.max": "250000"}, 3),
        ("0::/system.slice/solo.service\n", {"system.slice/cpu.max": "200000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "300000", "a/b/cpu.max": "50000", "cpu.max": "max"}, 1),
        ("0::/a/b\n", {"other/cpu.max": "100000"}, 8),
        ("0::/../../host/path\n", {"cpu.max": "100000"}, 1),
        ("7:memory:/m\n4:cpu,cpuacct:/a:b\n0::/\n", {"cpu/a:b/cpu.cfs_quota_us": "200000"}, 2),
        ("7:memory:/m\n", {"m/cpu.max": "100000"}, 8),
        ("no cgroup\n", {}, 8),
        ("0::/\n", {"cpu.max": "10 0"}, 8),
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
    ],
)
def test_the_least_quota_of_the_own_cgroup_and_those_above_holds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    quotas: dict[str, str],
    expected: int,
) -> None:
    (tmp_path / "own").write_text(own)
    for name, quota in quotas.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        is_v2 = name.endswith("cpu.max")
        file.write_text(quota if not is_v2 or " " in quota else f"{quota} 100000\n")
        if not is_v2:
            file.with_name("cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path / "none")
    monkeypatch.setattr(cores, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert cores.count_cores() == expected
