from __future__ import annotations

from importlib import metadata

import pytest

from service.__main__ import main
from service.version import read_version


def test_the_version_is_that_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"solo-serve": "1.2.3"}.__getitem__)
    assert read_version() == "1.2.3"


def test_a_source_tree_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", find)
    assert read_version() == "0"


def test_the_command_says_its_version_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"solo-serve {read_version()}\n"
