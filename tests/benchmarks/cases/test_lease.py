"""`benchmarks lease`, from its command line to its summary, on the CPU."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import lease as case
from benchmarks.cases.device_tests import count_results
from benchmarks.harness.steps import Step

RunCase = Callable[..., Any]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_of_it_runs_without_a_gpu(run_case: RunCase, tmp_path: Path) -> None:
    """Two networks are compiled, which takes minutes."""
    report = run_case("lease", "--rehearse", "--folder", tmp_path / "lease", "--minutes", 28)
    status = {row["step"]: (row["status"], row["reason"]) for row in report["steps"]}
    not_run = {name for name, (how, _) in status.items() if how != "ok"}
    assert not_run <= {"kernels_sanitized", "kernels_timed"}, status
    assert {row["how"].split(",")[0].split()[0] for row in report["speeds"]} >= {
        "aotinductor",
        "eager",
        "onnxruntime",
        "server",
    }


def test_the_first_step_runs_and_a_second_call_has_its_result(
    run_case: RunCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lease"
    flags = ("--rehearse", "--folder", folder, "--steps", "environment", "kernels_timed")
    first = run_case("lease", *flags)
    assert [row["status"] for row in first["steps"]] == ["ok", "not run"]
    assert min(first["ceilings"].values()) > 0 and first["rehearsal"]
    printed = capsys.readouterr().out
    assert "| environment | ok |" in printed and "there is no GPU" in printed
    assert (folder / "summary.md").read_text().strip() == printed.strip()
    with tarfile.open(folder / "logs.tar.gz") as tar:
        assert tar.getnames() == ["environment.log"]
    again = run_case("lease", *flags, "--minutes", 0)
    assert again["steps"] == first["steps"]


def test_steps_that_fail_make_the_command_fail(
    run_case: RunCase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = Step(
        name="broken", command=["python3", "-S", "-c", "raise SystemExit('oh')"], limit_s=30
    )
    monkeypatch.setattr(case, "list_steps", lambda lease: [broken])
    flags = ("--rehearse", "--folder", tmp_path / "lease")
    report = run_case("lease", *flags, status=1)
    assert report["steps"][0]["reason"] == "exit status 1: oh"
    assert "lease: broken failed" in capsys.readouterr().err
    line = (tmp_path / "lease" / "results.jsonl").read_text()
    assert json.loads(line)["step"] == "broken"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "finds no CUDA device; to check that all steps run: --rehearse"),
        (("--rehearse", "--steps", "nothing"), "no step 'nothing', expected environment, "),
        (("--rehearse", "--data", "/no/such"), "/no/such is not a folder"),
        (("--rehearse", "--pictures", "/no/such"), "/no/such is not a folder"),
        (("--pack-to", "{tmp}", "--carry", "/no/such"), "/no/such does not exist"),
    ],
)
def test_what_cannot_run_says_why(
    run_case: RunCase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = [flag.replace("{tmp}", str(tmp_path / "new")) for flag in flags]
    run_case("lease", "--folder", tmp_path / "lease", *given, status=1)
    assert message in capsys.readouterr().err


def test_tests_are_counted() -> None:
    assert count_results("...\n3 passed, 2 skipped in 1.2s") == {"passed": 3, "skipped": 2}
    assert count_results("1 failed, 3 passed, 1 error in 9s") == {
        "failed": 1,
        "passed": 3,
        "error": 1,
    }
    assert count_results("no tests ran in 0.1s") == count_results("") == {}
