from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs.database import JournalDiffers
from service.jobs.errors import ImageUnusable, RunFailed
from service.jobs.files import ImageFile, LocalFile, build_folder
from service.jobs.journal import Journal
from service.jobs.listing import Listing
from service.predict.job import (
    MOST_BYTES,
    Found,
    Item,
    Notes,
    PredictJob,
    build_items,
    read_data,
    read_stamp,
    write_results,
)
from service.predict.predictors import Prediction


class SlowPredictor:
    """Answers only when it is let; counts how many wait."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.started = threading.Semaphore(0)
        self.at_once = self.most = 0
        self._lock = threading.Lock()

    def predict(self, data: bytes) -> Prediction:
        if data == b"end":
            raise RunFailed("it is over")
        with self._lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        self.started.release()
        assert self.go.acquire(timeout=30)
        with self._lock:
            self.at_once -= 1
        if data == b"bad":
            raise ImageUnusable("it is bad")
        return Prediction([{"of": data.decode()}], "segmentation", "m:1")


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    names = [f"{index}.png" for index in range(8)]
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(str(index).encode())
    return build_items(list_files(tmp_path, *names), range(1, 9), overlays=False)


def list_files(folder: Path, *names: str) -> Listing:
    listing = Listing()
    root = build_folder(str(folder))
    listing.cover(root.address)
    listing.files += [LocalFile(root, name) for name in names]
    return listing


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal", {}) as opened:
        yield opened


def path_of(item: Item) -> Path:
    return Path(item.file.key)


def done(journal: Journal, items: list[Item]) -> list[int]:
    return [item.image_id for item in items if journal.find(item.file.key) is not None]


def test_no_more_than_jobs_at_once(items: list[Item], journal: Journal) -> None:
    predictor = SlowPredictor()
    predictor.go.release(len(items))
    outcomes = list(PredictJob(predictor, Notes(journal, None), 3).run(items))
    assert {item.image_id for item, _ in outcomes} == set(range(1, 9))
    assert predictor.most <= 3
    assert done(journal, items) == list(range(1, 9))


def test_three_are_asked_at_once(items: list[Item], journal: Journal) -> None:
    predictor = SlowPredictor()
    job = PredictJob(predictor, Notes(journal, None), 3)
    thread = threading.Thread(target=lambda: list(job.run(items)))
    thread.start()
    for _ in range(3):
        assert predictor.started.acquire(timeout=30)
    predictor.go.release(len(items))
    thread.join()
    assert predictor.most == 3


def test_a_bad_image_does_not_stop_the_others(items: list[Item], journal: Journal) -> None:
    path_of(items[2]).write_bytes(b"bad")
    predictor = SlowPredictor()
    predictor.go.release(len(items))
    outcomes = PredictJob(predictor, Notes(journal, None), 2).run(items)
    failed = [item.image_id for item, failure in outcomes if failure]
    assert failed == [3]
    assert done(journal, items) == [1, 2, 4, 5, 6, 7, 8]


def test_what_has_begun_is_finished_and_nothing_else_begins(
    items: list[Item], journal: Journal
) -> None:
    path_of(items[0]).write_bytes(b"end")
    predictor = SlowPredictor()
    later = threading.Timer(0.2, predictor.go.release)  # lets the second image go on
    later.start()
    with pytest.raises(RunFailed):
        list(PredictJob(predictor, Notes(journal, None), 2).run(items))
    later.join()
    assert predictor.at_once == 0
    assert done(journal, items) == [2]


def test_an_image_that_is_gone_fails(items: list[Item], journal: Journal) -> None:
    path_of(items[0]).unlink()
    ((item, failure),) = PredictJob(SlowPredictor(), Notes(journal, None), 1).run(items[:1])
    assert item is items[0]
    assert "No such file" in str(failure)


def test_ids_and_names_follow_the_files() -> None:
    listing = list_files(Path("in"), "a/x.png", "b/x.png", "c.jpg")
    items = build_items(listing, [7, ImageUnusable("it has no id"), 9], overlays=True)
    assert [(item.image_id, item.name, item.overlay) for item in items] == [
        (7, "a/x.png", "00001_x.png"),
        (9, "c.jpg", "00003_c.png"),
    ]
    assert build_items(listing, [1, 2, 3], overlays=False)[0].overlay is None


@pytest.mark.parametrize(
    ("stem", "picture"),
    [
        ("l" * 249, f"00001_{'l' * 120}.png"),
        ("ü" * 120, f"00001_{'ü' * 60}.png"),
        ("x" + "東" * 80, f"00001_x{'東' * 39}.png"),
        ("M\udcfcller", "00001_M\\xfcller.png"),
        ("a\nb", "00001_a\\nb.png"),
    ],
)
def test_pictures_have_short_names_of_text(tmp_path: Path, stem: str, picture: str) -> None:
    (item,) = build_items(list_files(tmp_path, f"{stem}.jpg"), [1], overlays=True)
    assert item.overlay == picture
    assert len(picture.encode()) <= 143
    (tmp_path / picture).touch()


class BrokenPredictor:
    """Fails as the files say, in any way."""

    def __init__(self, failures: dict[bytes, BaseException | Prediction]) -> None:
        self.failures = failures

    def predict(self, data: bytes) -> Prediction:
        failure = self.failures.get(data, Prediction([{"of": data.decode()}], "contour", "m:1"))
        if isinstance(failure, BaseException):
            raise failure
        return failure


def test_no_exception_of_one_image_ends_the_run(items: list[Item], journal: Journal) -> None:
    failures: dict[bytes, BaseException | Prediction] = {
        b"0": MemoryError(),
        b"1": OSError("broken"),
        b"2": RecursionError("too deep"),
        b"3": KeyError("score"),
        b"4": Prediction([{"of": "\ud800"}], "contour", "m:1"),
        b"5": Prediction([{"of": 2**70}], "contour", "m:1"),
    }
    outcomes = PredictJob(BrokenPredictor(failures), Notes(journal, None), 2).run(items)
    reasons = {item.image_id - 1: str(failure) for item, failure in outcomes}
    assert [reasons[index].partition(":")[0] for index in range(8)] == [
        *("MemoryError", "OSError", "RecursionError", "KeyError"),
        *("TypeError", "TypeError", "None", "None"),
    ]
    assert done(journal, items) == [7, 8]


def test_an_error_of_the_journal_ends_the_run(items: list[Item], journal: Journal) -> None:
    other = Prediction([], "contour", "m:2")
    predictor = BrokenPredictor({b"1": other})
    with pytest.raises(JournalDiffers):
        list(PredictJob(predictor, Notes(journal, None), 1).run(items))
    assert done(journal, items) == [1]


def picture_of(item: Item, overlay: str) -> tuple[Item, Found]:
    drawn = Item(item.file, item.name, item.image_id, overlay)
    return drawn, Found("m:1", [], truncated=False, picture=b"picture")


def test_a_picture_that_cannot_be_written_is_its_images_failure(
    items: list[Item], journal: Journal, tmp_path: Path
) -> None:
    notes = Notes(journal, tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for overlay in ("folder.png", "file/x.png", "n" * 300):
        item, found = picture_of(items[0], overlay)
        with pytest.raises(ImageUnusable, match=f"cannot write .*{overlay}"):
            notes.note(item, [1, 2], found)
        assert notes.find_open([item]) == [item]
    item, found = picture_of(items[0], "x.png")
    notes.note(item, read_stamp(item.file), found)
    assert (tmp_path / "x.png").read_bytes() == b"picture"
    assert notes.find_open([item]) == []
    item, _ = picture_of(items[0], "n" * 300)
    assert notes.find_open([item]) == [item]


def test_a_full_disk_ends_the_run(
    items: list[Item], journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("job.replacing", "outputs.replace_bytes"):
        monkeypatch.setattr(f"service.predict.{name}", fill)
    item, found = picture_of(items[0], "x.png")
    with pytest.raises(RunFailed, match=r"cannot write .*x\.png: No space left"):
        Notes(journal, tmp_path).note(item, [1, 2], found)
    assert done(journal, items) == []
    with pytest.raises(RunFailed, match=r"cannot write .*out\.json: No space left"):
        write_results(tmp_path / "out.json", [], journal)


def file_of(path: Path) -> ImageFile:
    return LocalFile(build_folder(str(path.parent)), path.name)


def test_what_is_no_image_file_is_not_read(tmp_path: Path) -> None:
    huge, empty, folder = tmp_path / "huge.png", tmp_path / "empty.png", tmp_path / "folder.png"
    with open(huge, "wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ImageUnusable, match=f"has {MOST_BYTES + 1} bytes, more than {MOST_BYTES}"):
        read_stamp(file_of(huge))
    os.truncate(huge, MOST_BYTES)
    assert read_stamp(file_of(huge))[0] == MOST_BYTES
    empty.touch()
    with pytest.raises(ImageUnusable, match="empty_image"):
        read_data(file_of(empty))
    folder.mkdir()
    for read in (read_stamp, read_data):
        with pytest.raises(ImageUnusable, match=r"regular file|directory"):
            read(file_of(folder))
        with pytest.raises(ImageUnusable, match=r"^No such file or directory$"):
            read(file_of(tmp_path / "gone.png"))


def test_results_are_written_whole_or_not_at_all(
    items: list[Item], journal: Journal, tmp_path: Path
) -> None:
    predictor = SlowPredictor()
    predictor.go.release(len(items))
    list(PredictJob(predictor, Notes(journal, None), 2).run(items[:6]))
    out = tmp_path / "results.json"
    assert write_results(out, items[:6], journal) == 6
    first = json.loads(out.read_bytes())
    assert [(r["image_id"], r["of"]) for r in first] == [(i + 1, str(i)) for i in range(6)]
    with pytest.raises(KeyError):  # the last two are not done
        write_results(out, items, journal)
    assert json.loads(out.read_bytes()) == first
    assert write_results(out, [], journal) == 0
    assert json.loads(out.read_bytes()) == []
