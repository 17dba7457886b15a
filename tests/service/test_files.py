from __future__ import annotations

import errno
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from service.files import STALE_S, locked, replace_bytes, replace_text, replacing


def test_a_file_and_its_folder_appear_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    for text in ("é", ""):
        replace_text(path, text)
        assert path.read_bytes() == text.encode()
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_file_before_stays(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        raise error
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


def test_an_error_before_anything_is_written_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), replacing(tmp_path / "a"):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").write_text("half")
    with replacing(tmp_path / "a") as partial:
        assert not partial.exists()
        partial.write_text("whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        steps.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        assert source.read_bytes() == b"new"
        steps.append(f"replace {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    replace_bytes(tmp_path / "a.txt", b"new")
    assert steps == ["fsync .a.txt.partial", "replace a.txt", f"fsync {tmp_path.name}"]
    steps.clear()
    replace_bytes(tmp_path / "a.txt", b"new", durable=False)
    assert steps == ["replace a.txt"]


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(OSError, match="File too large"),
            replacing(path) as partial,
            partial.open("xb") as file,
        ):
            file.write(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "a"
    other.write_bytes(b"not ours")
    path.symlink_to(other)
    replace_bytes(path, b"new")
    assert other.read_bytes() == b"not ours"
    assert path.read_bytes() == b"new" and not path.is_symlink()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        replace_bytes(tmp_path / "folder", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder", "other"]


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"old")
    file.chmod(0o640)
    replace_bytes(file, b"new")
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"new", 0o640)
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError) as caught:
        replace_bytes(tmp_path / "file" / "a.txt", b"new")
    assert caught.value.__context__ is None and (tmp_path / "file").is_file()


def test_a_link_to_the_file_itself_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("same")
    with replacing(file) as partial:
        os.link(file, partial)
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "same"


def test_writers_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with replacing(file, shared=True) as first:
        first.write_text("first")
        with replacing(file, shared=True) as second:
            second.write_text("second")
        assert file.read_text() == "second" and first.read_text() == "first"
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]


def test_what_killed_processes_left_in_a_shared_folder_goes_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / ".b.1234.partial", tmp_path / ".c.5678.partial"
    for partial in (old, new):
        partial.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * STALE_S,) * 2)
    replace_bytes(tmp_path / "a", b"", shared=True)
    assert not old.exists() and new.exists()


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        entered = threading.Event()

        def enter(path: Path = path, entered: threading.Event = entered) -> None:
            with locked(path):
                entered.set()

        waiting = threading.Thread(target=enter)
        with locked(path):
            waiting.start()
            assert not entered.wait(0.2)
        assert entered.wait(30)
        waiting.join()
    with pytest.raises(FileNotFoundError), locked(tmp_path / "missing"):
        pass
    assert not (tmp_path / "missing").exists()


def test_without_locks_of_the_file_system_nothing_is_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path):
        pass
