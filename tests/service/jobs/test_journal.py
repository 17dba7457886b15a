from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from service.jobs.database import JournalDiffers, JournalError, JournalInUse
from service.jobs.journal import Journal

OPTIONS: dict[str, Any] = {"url": None, "score_threshold": 0.5}
KEYS = [f"{index}.png" for index in range(6)]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.partial"


def append(journal: Journal, key: str, served: str = "m:1", of: str | None = None) -> None:
    journal.append(key, [{"of": of or key}], served=served, properties={"stamp": [1, 2]})


def done(journal: Journal) -> list[str]:
    return [key for key in KEYS if journal.find(key) is not None]


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def test_entries_are_there_after_reopening(path: Path) -> None:
    with Journal(path, OPTIONS) as journal:
        assert journal.served is None
        for key in KEYS[:3]:
            append(journal, key)
        assert journal.read_results("1.png") == [{"of": "1.png"}]
    with Journal(path, OPTIONS) as journal:
        assert done(journal) == KEYS[:3]
        assert journal.served == "m:1"
        append(journal, "3.png")
        for key in KEYS[:4]:
            assert journal.read_results(key) == [{"of": key}]
        assert journal.find("0.png") == {"stamp": [1, 2]}
        assert journal.find("5.png") is None
        with pytest.raises(KeyError, match=r"5\.png"):
            journal.read_results("5.png")


def test_the_last_entry_of_an_image_counts(path: Path) -> None:
    with Journal(path, OPTIONS) as journal:
        append(journal, "0.png")
        journal.append("0.png", [{"of": "later"}], served="m:1", properties={"stamp": [3]})
    with Journal(path, OPTIONS) as journal:
        assert journal.read_results("0.png") == [{"of": "later"}]
        assert journal.find("0.png") == {"stamp": [3]}


def test_a_cut_log_keeps_its_first_entries_and_can_be_continued(path: Path, tmp_path: Path) -> None:
    """Whatever part of the write-ahead log has reached the file, entries are whole or missing."""
    states, sizes = tmp_path / "copy", [0]
    with Journal(path, OPTIONS) as journal:
        for key in KEYS[:3]:
            append(journal, key)
            sizes.append(wal_of(path).stat().st_size)
        data, log = path.read_bytes(), wal_of(path).read_bytes()
    for size in [*range(0, len(log), 997), *sizes, *(size - 1 for size in sizes[1:])]:
        states.write_bytes(data)
        wal_of(states).write_bytes(log[:size])
        whole = sum(size >= end for end in sizes[1:])
        with Journal(states, OPTIONS) as journal:
            assert done(journal) == KEYS[:whole]
            append(journal, "5.png")
        with Journal(states, OPTIONS) as journal:
            assert done(journal) == [*KEYS[:whole], "5.png"]
            assert [journal.read_results(key) for key in KEYS[:whole]] == [
                [{"of": key}] for key in KEYS[:whole]
            ]


WRITER = """
import sys
from pathlib import Path
from service.jobs.journal import Journal
with Journal(Path(sys.argv[1]), {}) as journal:
    while True:
        for number in range(int(sys.argv[2]), 10**9):
            results = [{"of": number, "text": "x" * (number * 37 % 9000)}]
            journal.append(str(number), results, served="m:1", properties={})
            print(number, flush=True)
"""


def test_a_killed_process_loses_no_entry_that_was_appended(path: Path) -> None:
    count = 0
    chance = random.Random(5)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(count)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        printed = process.stdout.read().split()
        process.wait()
        said = int(printed[-1]) + 1 if printed else count + 1
        with Journal(path, {}) as journal:
            while journal.find(str(count)) is not None:
                text = "x" * (count * 37 % 9000)
                assert journal.read_results(str(count)) == [{"of": count, "text": text}]
                count += 1
        assert count - said in (0, 1)  # the last one may not have been printed


def test_only_one_process_writes_and_the_next_starts_when_it_is_killed(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        for restart in (False, True):
            with pytest.raises(JournalInUse, match=r"out\.partial: another run is writing it"):
                Journal(path, {}, restart=restart)
    finally:
        process.kill()
        process.wait()
    with Journal(path, {}) as journal:
        assert journal.find("0") is not None


def test_only_one_journal_of_a_process_writes(path: Path) -> None:
    with Journal(path, OPTIONS), pytest.raises(JournalInUse, match="another run is writing"):
        Journal(path, OPTIONS, restart=True)
    with Journal(path, OPTIONS):
        pass


OLD = b'{"format":1,"options":{"url":null}}\n{"format":1,"file":"/a.png","results":[]}\n'


def make_foreign_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE entries (key TEXT)")


def make_newer_journal(path: Path) -> None:
    with Journal(path, OPTIONS) as journal:
        append(journal, "0.png")
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 3")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(OLD),
        lambda path: path.write_bytes(b"\0" * 5000),
        make_foreign_database,
        make_newer_journal,
    ],
)
def test_other_formats_are_refused_and_replaced_only_by_a_restart(path: Path, make: Any) -> None:
    make(path)
    before = path.read_bytes()
    with pytest.raises(JournalDiffers, match=r"out\.partial is not a journal of this version"):
        Journal(path, OPTIONS)
    assert path.read_bytes() == before
    with Journal(path, OPTIONS, restart=True) as journal:
        assert done(journal) == []
        append(journal, "1.png")
    with Journal(path, OPTIONS) as journal:
        assert done(journal) == ["1.png"]


def test_a_damaged_journal_is_refused(path: Path) -> None:
    with Journal(path, OPTIONS) as journal:
        for key in KEYS:
            append(journal, key, of=key * 1000)
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 8192)
    with pytest.raises(JournalDiffers, match=r"out\.partial is damaged"):
        Journal(path, OPTIONS)


def test_an_empty_file_is_a_new_journal(path: Path) -> None:
    path.touch()
    wal_of(path).write_bytes(b"left behind")
    with Journal(path, OPTIONS) as journal:
        append(journal, "0.png")
    with Journal(path, OPTIONS) as journal:
        assert done(journal) == ["0.png"]


def test_other_options_are_named(path: Path) -> None:
    other = {"url": "http://x", "overlays": "drawn"}
    with Journal(path, OPTIONS):
        pass
    with Journal(path, other):  # there were no entries, so nothing is lost
        pass
    with Journal(path, OPTIONS) as journal:
        append(journal, "0.png")
    with pytest.raises(JournalDiffers) as caught:
        Journal(path, other)
    assert "overlays None, now 'drawn'; score_threshold 0.5, now None; url None, now" in str(
        caught.value
    )
    with Journal(path, other, restart=True) as journal:
        assert done(journal) == []
        assert journal.served is None


def test_results_of_another_version_are_refused(path: Path) -> None:
    with Journal(path, OPTIONS) as journal:
        append(journal, "0.png")
        with pytest.raises(JournalDiffers, match=r"1\.png was found by m:2, but .* began with m:1"):
            append(journal, "1.png", "m:2")
        assert done(journal) == ["0.png"]
    with Journal(path, OPTIONS) as journal, pytest.raises(JournalDiffers, match="began with m:1"):
        append(journal, "1.png", "m:2")


def test_threads_append_at_the_same_time(path: Path) -> None:
    with Journal(path, OPTIONS) as journal:

        def append_often(key: str) -> None:
            for number in range(50):
                append(journal, key, of=f"{key} {number}")
                assert journal.read_results(key) == [{"of": f"{key} {number}"}]

        threads = [threading.Thread(target=append_often, args=(key,)) for key in KEYS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Journal(path, OPTIONS) as journal:
        assert [journal.read_results(key) for key in KEYS] == [
            [{"of": f"{key} 49"}] for key in KEYS
        ]


def test_a_full_disk_leaves_the_journal_as_it_was(path: Path) -> None:
    with Journal(path, OPTIONS) as journal:
        append(journal, "0.png")
        size = wal_of(path).stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            with pytest.raises(
                JournalError, match=r"cannot use the journal .*out\.partial: disk I/O"
            ):
                append(journal, "1.png", of="x" * 9000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert done(journal) == ["0.png"]
        append(journal, "2.png")
    with Journal(path, OPTIONS) as journal:
        assert done(journal) == ["0.png", "2.png"]


def test_a_folder_that_cannot_be_written_is_named() -> None:
    for folder in (Path("/proc"), Path("/nowhere")):
        with pytest.raises(JournalError, match=rf"journal {folder}/x\.partial: unable to open"):
            Journal(folder / "x.partial", OPTIONS)


def test_remove_leaves_no_file(path: Path, tmp_path: Path) -> None:
    with Journal(path, OPTIONS) as journal:
        append(journal, "0.png")
        journal.remove()
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(JournalError, match="closed"):
            append(journal, "1.png")


def test_a_closed_journal_is_one_file(path: Path, tmp_path: Path) -> None:
    with Journal(path, OPTIONS) as journal:
        append(journal, "0.png")
        assert wal_of(path).exists()
    assert list(tmp_path.iterdir()) == [path]
    moved = tmp_path / "moved"
    shutil.move(path, moved)
    with Journal(moved, OPTIONS) as journal:
        assert done(journal) == ["0.png"]
