from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.observe.standard_error import StandardErrorHandler

PROGRAM = """
import os, sys
from service.observe.standard_error import open_standard_files
open_standard_files()
opened = os.open("/dev/null", os.O_RDONLY)
sys.stdout.write("x")
sys.stderr.write("x")
sys.stdout.flush()
sys.stderr.flush()
child = "import os; [os.fstat(d) for d in (0, 1, 2)]"
status = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", child])
kinds = [os.path.samestat(os.fstat(d), os.stat("/dev/null")) for d in (0, 1, 2)]
open(sys.argv[1], "w").write(f"{opened > 2} {status} {kinds}")
"""


@contextmanager
def pipe_as_standard_error(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The end that nobody reads yet."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield reader
        monkeypatch.undo()


def record(text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "levelname": "INFO"})


def read_all(reader: int) -> str:
    os.set_blocking(reader, False)
    data = b""
    try:
        while chunk := os.read(reader, 1 << 20):
            data += chunk
    except BlockingIOError:
        pass
    return data.decode()


def test_lines_that_nobody_reads_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = StandardErrorHandler()
    with pipe_as_standard_error(monkeypatch) as reader:
        for index in range(10_000):  # far more than a pipe holds
            handler.emit(record(f"line {index} " + 50 * "x"))
        first = read_all(reader).splitlines()
        assert 100 < len(first) < 10_000
        assert [line.split()[1] for line in first] == [str(i) for i in range(len(first))]
        handler.emit(record("read again"))
        handler.emit(record("and again"))
        lost = 10_000 - len(first)
        assert read_all(reader).splitlines() == [
            f"{lost} log lines were lost, standard error was not read",
            "read again",
            "and again",
        ]
        os.close(reader)


def test_a_line_that_is_cut_ends_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = StandardErrorHandler()
    with pipe_as_standard_error(monkeypatch) as reader:
        handler.emit(record(10_000_000 * "x"))
        cut = read_all(reader)
        assert 1000 < len(cut) < 10_000_000 and set(cut) == {"x"}
        handler.emit(record("whole"))
        assert read_all(reader).splitlines() == [
            "",
            "1 log lines were lost, standard error was not read",
            "whole",
        ]
        os.close(reader)


def test_a_long_line_that_is_read_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = StandardErrorHandler()
    text = "".join(f"{i}é" for i in range(5000))
    with pipe_as_standard_error(monkeypatch) as reader:
        handler.emit(record(text))
        assert read_all(reader) == f"{text}\n"
        os.close(reader)


def test_a_reader_that_has_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = StandardErrorHandler()
    with pipe_as_standard_error(monkeypatch) as reader:
        os.close(reader)
        for _ in range(3):
            handler.emit(record("nobody reads this"))
    assert handler._lost == 3


@pytest.mark.parametrize("stream", [None, "closed"])
def test_no_standard_error_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stream: str | None
) -> None:
    with open(tmp_path / "log", "w") as closed:
        pass
    monkeypatch.setattr(sys, "stderr", None if stream is None else closed)
    StandardErrorHandler().emit(record("nobody reads this"))


def test_a_record_that_cannot_be_formatted_is_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    StandardErrorHandler().emit(logging.makeLogRecord({"msg": "%d", "args": ("text",)}))
    assert "Logging error" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [(), (0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_closed_standard_files_become_the_null_device(
    closed: tuple[int, ...], tmp_path: Path
) -> None:
    """Otherwise the first files that are opened, and those of children, would get their numbers."""
    start = f"import os, sys; [os.close(d) for d in {closed}]; os.execv(sys.argv[1], sys.argv[1:])"
    python = sys.executable
    command = [python, "-c", start, python, "-c", PROGRAM, str(tmp_path / "found")]
    subprocess.run(command, check=True, stdin=subprocess.PIPE, capture_output=True)
    kinds = [descriptor in closed for descriptor in (0, 1, 2)]
    assert (tmp_path / "found").read_text() == f"True 0 {kinds}"
