from __future__ import annotations

import threading
from pathlib import Path

import pytest

from service.engines.local_cache import find_local_cache, lock_file


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


def test_a_locked_file_is_waited_for_and_another_is_not(tmp_path: Path) -> None:
    entered = threading.Event()

    def enter(file: Path) -> None:
        with lock_file(file):
            entered.set()

    waiting = threading.Thread(target=enter, args=(tmp_path / "a",))
    with lock_file(tmp_path / "a"):
        enter(tmp_path / "b")
        assert entered.is_set()
        entered.clear()
        waiting.start()
        assert not entered.wait(0.2)
    assert entered.wait(30)
    waiting.join()


def test_where_no_lock_is_possible_work_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for file in (None, tmp_path / "file" / "cache"):
        with lock_file(file):
            pass
