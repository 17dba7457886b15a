from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from training import commands
from training.commands import MODULES, main

ROOT = Path(__file__).resolve().parents[2]


def test_every_script_of_the_project_that_runs_here_is_known() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    ours = {name for name, target in scripts.items() if target == "training.commands:main"}
    assert ours == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_command_has_the_name_of_the_process(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/bin/{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(("name", "extra"), [("solo-eval", "training"), ("solo-export", "export")])
def test_a_missing_package_is_one_line_with_the_extra(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(module: str) -> object:
        return import_module("torhc.of_no_release")

    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(commands, "import_module", fail)
    assert main() == 1
    advice = f"it is in the extra '{extra}' of solo-serve (make install-training)"
    message = f"{name}: torhc is not installed; {advice}\n"
    assert capsys.readouterr().err == message


def test_a_missing_module_of_the_project_is_no_missing_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["solo-eval"])
    monkeypatch.setitem(MODULES, "solo-eval", "training.no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main()
