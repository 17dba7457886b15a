from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.predict.errors import ImageUnusable, RunFailed
from service.predict.files import key_of
from service.predict.job import Item, Notes, PredictJob, build_items, write_results
from service.predict.journal import Journal
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
    files = [tmp_path / f"{index}.png" for index in range(8)]
    for index, file in enumerate(files):
        file.write_bytes(str(index).encode())
    return build_items(files, {file: i for i, file in enumerate(files, 1)}, overlays=False)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal", {}) as opened:
        yield opened


def path_of(item: Item) -> Path:
    assert isinstance(item.file, Path)
    return item.file


def done(journal: Journal, items: list[Item]) -> list[int]:
    return [item.image_id for item in items if journal.find(key_of(item.file)) is not None]


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
    files = [Path("a/x.png"), Path("b/x.png"), Path("c.jpg")]
    items = build_items(files, {files[0]: 7, files[2]: 9}, overlays=True)
    assert [(item.image_id, item.overlay) for item in items] == [
        (7, "00001_x.png"),
        (9, "00003_c.png"),
    ]


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
