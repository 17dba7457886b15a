"""Two runs into one folder, and what a killed one leaves."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.options import parse_arguments
from tests.support.processes import finish, signal_groups, start_python, wait_until
from training.options import build_parser
from training.run_folder import LOCK_FILE, FolderInUse, claimed, export_command, require_writable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")

HOLD = """
import os, sys, time
from pathlib import Path
from training.run_folder import claimed
with claimed(Path(sys.argv[1])):
    if os.fork() == 0:  # as a data loading process, which may outlive its parent for seconds
        time.sleep(600)
    Path(sys.argv[1], "held").touch()
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A folder that another process holds; the test ends that process."""
    folder = tmp_path / "run"
    processes = start_python([["-c", HOLD, str(folder)]])
    wait_until((folder / "held").exists, processes)
    yield folder
    signal_groups(processes, signal.SIGKILL)
    finish(processes)


def owner(folder: Path) -> int:
    return int((folder / LOCK_FILE).read_text().split()[1])


def test_a_second_run_is_refused_and_the_first_is_named(held: Path) -> None:
    for _ in range(2):  # the refusal itself must not end the lock or its text
        with pytest.raises(FolderInUse) as caught, claimed(held):
            pass
        assert str(held) in str(caught.value)
        assert f"process {owner(held)} on {socket.gethostname()} since 2" in str(caught.value)


def test_the_lock_of_a_killed_run_is_free_at_once(held: Path) -> None:
    os.kill(owner(held), signal.SIGKILL)
    os.waitpid(owner(held), 0)
    assert (held / LOCK_FILE).read_text()
    with claimed(held):
        assert owner(held) == os.getpid()


def test_a_folder_is_free_after_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    for name in ("one", "two"):
        with claimed(folder):
            (folder / name).touch()
    assert sorted(p.name for p in folder.iterdir()) == [LOCK_FILE, "one", "two"]
    assert (folder / LOCK_FILE).read_text() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="lists open files as Linux does")
def test_the_lock_file_is_closed_after_a_run(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with claimed(tmp_path / "run"):
            (tmp_path / "run" / "one").touch()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), claimed(tmp_path / "run"):
        raise ValueError("broken")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "theirs").touch()
    with pytest.raises(ValueError, match="broken"), claimed(tmp_path / "run"):
        raise ValueError("broken")
    assert (tmp_path / "run" / "theirs").exists()


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(FileExistsError, match="run"), claimed(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "a" / "b"):
        require_writable(folder)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(OSError, match=f"^{folder} cannot be written: {tmp_path / 'file'}: N"):
            require_writable(folder)


@pytest.mark.parametrize(
    "more", [[], ["--format", "labelme", "--val-fraction", "0.3", "--val-split", "test"]]
)
def test_the_command_that_publishes_a_run_reads_the_same_data(
    more: list[str], tmp_path: Path
) -> None:
    trained = build_parser().parse_args(["--data", "my cells", *more])
    program, *arguments = shlex.split(export_command(trained, tmp_path))
    options = parse_arguments(arguments)
    assert program == "solo-export" and options.checkpoint == tmp_path / "best.pt"
    for name in ("data", "format", "val_fraction"):
        assert getattr(options, name) == getattr(trained, name)
    assert options.split == trained.val_split
