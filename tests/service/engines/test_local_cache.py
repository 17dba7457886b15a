from __future__ import annotations

from pathlib import Path

import pytest

from service.engines.local_cache import find_local_cache


def test_the_folder_that_was_named_is_made(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b"
    assert find_local_cache(wanted) == wanted
    assert wanted.is_dir()


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "HOME"])
def test_else_it_is_the_users(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(name, str(tmp_path))
    parts = () if name == "XDG_CACHE_HOME" else (".cache",)
    assert find_local_cache() == tmp_path.joinpath(*parts, "solo-serve")


def test_none_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert find_local_cache(tmp_path / "file" / "cache") is None
    assert find_local_cache(tmp_path / "file") is None
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert find_local_cache(tmp_path / "read-only") is None
