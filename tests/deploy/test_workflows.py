"""The workflows of GitHub Actions: what they run exists, and actionlint accepts them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github/workflows"
WORKFLOWS = sorted(path.name for path in FOLDER.glob("*.yml"))
ACTIONLINT = shutil.which(
    "actionlint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
)


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    return loaded


def steps(name: str) -> list[dict[str, Any]]:
    jobs = load(name)["jobs"].values()
    return [step for job in jobs for step in job.get("steps", [])]


def test_there_are_two() -> None:
    assert WORKFLOWS == ["ci.yml", "release.yml"]


@pytest.mark.skipif(ACTIONLINT is None, reason="actionlint is not installed")
def test_actionlint_accepts_them() -> None:
    command = [str(ACTIONLINT), *(str(FOLDER / name) for name in WORKFLOWS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", WORKFLOWS)
def test_rights_are_few_and_every_job_ends(name: str) -> None:
    workflow = load(name)
    assert workflow["permissions"] == {"contents": "read"}
    for title, job in workflow["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 120, title


@pytest.mark.parametrize("name", WORKFLOWS)
def test_targets_and_files_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    commands = " ".join(step.get("run", "") for step in steps(name))
    assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= targets
    for path in re.findall(r"\$GITHUB_WORKSPACE/([\w./-]+)", commands):
        assert (ROOT / path).exists(), path
    for job in load(name)["jobs"].values():
        for each in job.get("strategy", {}).get("matrix", {}).get("include", []):
            assert (ROOT / each["dockerfile"]).exists()


def test_every_supported_python_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = [re.search(r":: (3\.\d+)$", each) for each in project["classifiers"]]
    tested = load("ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == [each.group(1) for each in found if each]


def test_a_release_waits_for_the_tests_and_stores_no_token() -> None:
    jobs = load("release.yml")["jobs"]
    assert jobs["distributions"]["needs"] == "ci"
    assert jobs["pypi"]["needs"] == jobs["images"]["needs"] == "distributions"
    assert jobs["pypi"]["permissions"] == {"id-token": "write"}
    secrets = re.findall(r"secrets\.(\w+)", (FOLDER / "release.yml").read_text("utf-8"))
    assert set(secrets) == {"GITHUB_TOKEN"}
    (push,) = [step for step in jobs["images"]["steps"] if step.get("id") == "push"]
    assert push["with"]["sbom"] is True
    assert push["with"]["provenance"] == "mode=max"
    cpu, gpu = jobs["images"]["strategy"]["matrix"]["include"]
    assert cpu["platforms"] == "linux/amd64,linux/arm64"
    assert gpu["platforms"] == "linux/amd64"
