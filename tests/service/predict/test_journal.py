from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import pytest

from service.errors import StartupError
from service.predict.errors import RunFailed
from service.predict.files import stamp_of
from service.predict.journal import Journal

OPTIONS: dict[str, Any] = {"url": None, "score_threshold": 0.5}


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{index}.png" for index in range(6)]
    for file in files:
        file.write_bytes(file.name.encode())
    return files


def note(journal: Journal, file: Path, served: str = "m:1") -> None:
    journal.append(file, stamp_of(file), served, [{"of": file.name}], None)


def done(journal: Journal, images: list[Path]) -> list[str]:
    return [file.name for file in images if journal.find(file) is not None]


def test_what_was_noted_is_there_again(tmp_path: Path, images: list[Path]) -> None:
    path = tmp_path / "out.partial"
    with Journal(path, OPTIONS) as journal:
        for file in images[:3]:
            note(journal, file)
        assert journal.read_results(images[1]) == [{"of": "1.png"}]
    with Journal(path, OPTIONS) as journal:
        assert done(journal, images) == ["0.png", "1.png", "2.png"]
        assert journal.served == "m:1"
        note(journal, images[3])
        for file in images[:4]:
            assert journal.read_results(file) == [{"of": file.name}]
        entry = journal.find(images[0])
        assert entry is not None
        assert entry.stamp == stamp_of(images[0])


def test_the_last_note_of_an_image_holds(tmp_path: Path, images: list[Path]) -> None:
    path = tmp_path / "out.partial"
    with Journal(path, OPTIONS) as journal:
        note(journal, images[0])
        journal.append(images[0], [1, 2], "m:1", [{"of": "later"}], None)
    with Journal(path, OPTIONS) as journal:
        assert journal.read_results(images[0]) == [{"of": "later"}]


def test_cut_anywhere_it_keeps_whole_lines_and_goes_on(tmp_path: Path, images: list[Path]) -> None:
    whole = tmp_path / "whole"
    with Journal(whole, OPTIONS) as journal:
        for file in images[:3]:
            note(journal, file)
    data = whole.read_bytes()
    for size in [*range(0, len(data), 3), len(data) - 1, len(data)]:
        path = tmp_path / "cut"
        path.write_bytes(data[:size])
        with Journal(path, OPTIONS) as journal:
            lines = data[:size].count(b"\n")
            assert len(done(journal, images)) == max(0, lines - 1)
            note(journal, images[5])
        with Journal(path, OPTIONS) as journal:
            assert len(done(journal, images)) == max(0, lines - 1) + 1


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"[]\n", b"7\n", b"{}\n", b"no JSON"])
def test_what_follows_damage_is_done_again(
    tmp_path: Path, images: list[Path], damage: bytes
) -> None:
    path = tmp_path / "out.partial"
    with Journal(path, OPTIONS) as journal:
        note(journal, images[0])
    with open(path, "ab") as file:
        file.write(damage)
    with Journal(path, OPTIONS) as journal:
        assert done(journal, images) == ["0.png"]
        note(journal, images[1])
    with Journal(path, OPTIONS) as journal:
        assert done(journal, images) == ["0.png", "1.png"]


def test_other_options_are_named(tmp_path: Path, images: list[Path]) -> None:
    path = tmp_path / "out.partial"
    other = {"url": "http://x", "overlays": "drawn"}
    with Journal(path, OPTIONS):
        pass
    with Journal(path, other):  # nothing was done, so nothing is lost
        pass
    with Journal(path, OPTIONS) as journal:
        note(journal, images[0])
    with pytest.raises(StartupError) as caught:
        Journal(path, other)
    assert "overlays None, now 'drawn'; score_threshold 0.5, now None; url None, now" in str(
        caught.value
    )
    with Journal(path, other, restart=True) as journal:
        assert done(journal, images) == []
        assert journal.served is None


def test_only_one_run_writes(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    with Journal(path, OPTIONS), pytest.raises(StartupError, match="another run is writing"):
        Journal(path, OPTIONS, restart=True)
    with Journal(path, OPTIONS):
        pass


def test_results_of_another_version_are_refused(tmp_path: Path, images: list[Path]) -> None:
    with Journal(tmp_path / "out.partial", OPTIONS) as journal:
        note(journal, images[0])
        with pytest.raises(RunFailed, match="m:2, but the run began with m:1"):
            note(journal, images[1], "m:2")
        assert done(journal, images) == ["0.png"]


def test_threads_do_not_mix_their_lines(tmp_path: Path, images: list[Path]) -> None:
    path = tmp_path / "out.partial"
    with Journal(path, OPTIONS) as journal:

        def note_often(file: Path) -> None:
            for _ in range(50):
                note(journal, file)

        threads = [threading.Thread(target=note_often, args=(file,)) for file in images]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert path.read_bytes().count(b"\n") == 1 + 50 * len(images)
    with Journal(path, OPTIONS) as journal:
        assert len(done(journal, images)) == len(images)


def test_a_full_disk_leaves_no_piece_of_a_line(tmp_path: Path, images: list[Path]) -> None:
    path = tmp_path / "out.partial"
    with Journal(path, OPTIONS) as journal:
        note(journal, images[0])
        size = path.stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            with pytest.raises(OSError, match=r"10 of [0-9]+ bytes were written"):
                note(journal, images[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.stat().st_size == size
        note(journal, images[2])
    with Journal(path, OPTIONS) as journal:
        assert done(journal, images) == ["0.png", "2.png"]
