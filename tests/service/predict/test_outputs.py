from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from service.errors import StartupError
from service.files import replace_bytes
from service.predict.outputs import (
    Outputs,
    check_outputs,
)

OURS = b'[\n{"image_id":1,"file_name":"a.png"}\n]\n'


@pytest.mark.parametrize("content", [b"", b"\n", b"[\n]\n", OURS])
def test_earlier_results_and_empty_files_may_be_replaced(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out.json"
    assert check_outputs(out, None).out == out
    out.write_bytes(content)
    assert check_outputs(out, None).out == out
    assert out.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [b"text", b"\x89PNG\r\n\x1a\n", b'[{"image_id": 1}]', json.dumps({"images": []}).encode()],
)
def test_a_file_of_another_origin_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out.json"
    out.write_bytes(content)
    with pytest.raises(StartupError, match=r"out\.json exists and was not written by this command"):
        check_outputs(out, None)
    assert out.read_bytes() == content


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for name in ("pipe", "socket"):
        with pytest.raises(StartupError, match=f"{name} is not a regular file"):
            check_outputs(tmp_path / name, None)
    with pytest.raises(StartupError, match="/dev/null is not a regular file"):
        check_outputs(Path("/dev/null"), None)
    for folder in (tmp_path, Path(".."), Path()):
        with pytest.raises(StartupError, match="is a folder"):
            check_outputs(folder, None)
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="Not a directory"):
        check_outputs(tmp_path / "file" / "out.json", None)
    with pytest.raises(StartupError, match="is not a folder"):
        check_outputs(tmp_path / "out.json", tmp_path / "file")


def test_a_file_that_may_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    out.touch(0o444)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(StartupError, match="is not writable"):
        check_outputs(out, None)


def test_links_are_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "deep" / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    outputs = check_outputs(link, None)
    assert outputs.out == target
    outputs.create()
    replace_bytes(outputs.out, OURS)
    assert link.is_symlink() and link.read_bytes() == OURS
    assert check_outputs(link, None).out == target
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(StartupError, match="symbolic links"):
        check_outputs(loop, None)


def test_own_files_are_named(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "out.json", tmp_path / "drawn")
    assert {path.name for path in outputs.name_own()} == {
        *("out.json", "out.json.partial", "out.json.partial-wal"),
        "drawn",
    }
    assert outputs.journal.name == "out.json.partial"


def test_folders_are_made_and_tried(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "a" / "b" / "out.json", tmp_path / "c" / "drawn")
    outputs.create()
    outputs.create()
    assert outputs.out.parent.is_dir()
    assert outputs.overlays is not None and list(outputs.overlays.iterdir()) == []
    same = Outputs(tmp_path / "same", tmp_path / "same")
    with pytest.raises(StartupError, match="same is a folder"):
        same.create()
    with pytest.raises(OSError):
        Outputs(tmp_path / "out.json", Path("/proc/self")).create()
