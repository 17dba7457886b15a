from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import orjson
import pytest

from pipeline.decode import read_header
from pipeline.writers import FormatName
from service.errors import InvalidParameter, UnknownJob
from service.http.job_results import ResultFormat, Stored, build_answer
from service.jobs.records import FileResult, JobRecord
from service.jobs.store import JobStore
from tests.support.jobs import FAILED, build_submission

CLASSES = [{"category_id": 4, "name": "cell"}, {"category_id": 9, "name": "other"}]
INSTANCE = {
    "category_id": 9,
    "category": "other",
    "score": 0.5,
    "bbox": [1, 0, 2, 3],
    "area": 6,
    "segmentation": {"size": [3, 4], "counts": "363"},
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(tmp_path, 10**6)
    yield opened
    opened.close()


def make_job(
    store: JobStore, *results: FileResult, parameters: Mapping[str, object] | None = None
) -> JobRecord:
    """A job that is done."""
    submission = build_submission(len(results), classes=CLASSES, parameters=parameters or {})
    job, _ = store.accept(submission, None)
    for claim, result in zip(store.claim("w", len(results)), results, strict=True):
        store.finish("w", claim, result)
    return store.find(job.owner, job.id)


def found(name: str, *instances: dict[str, object]) -> FileResult:
    return FileResult("m:1", {"file_name": name, "width": 4, "height": 3}, instances)


def read(store: JobStore, job: JobRecord, wanted: ResultFormat) -> bytes:
    answer = build_answer(job, lambda: store.iterate_results(job.id), wanted, 0.0)
    return b"".join(answer.pieces)


def test_entries_of_good_and_bad_files(store: JobStore) -> None:
    job = make_job(store, found("a", INSTANCE), FAILED, found("b"))
    entries = json.loads(read(store, job, "json"))["results"]
    assert [entry["number"] for entry in entries] == [1, 2, 3]
    assert entries[0]["instances"] == [INSTANCE] and entries[2]["instances"] == []
    assert entries[1]["error"]["code"] == "corrupt_image" and "instances" not in entries[1]
    lines = read(store, job, "ndjson").splitlines()
    assert [orjson.loads(line) for line in lines] == entries
    coco = json.loads(read(store, job, "coco-results"))
    assert coco == [{"image_id": 1, "file_name": "a", **INSTANCE}]


def test_no_instances_are_valid_json(store: JobStore) -> None:
    job = make_job(store, FAILED)
    assert json.loads(read(store, job, "coco-results")) == []
    assert json.loads(read(store, job, "coco"))["images"] == []


def test_documents_have_the_classes_of_the_job(store: JobStore) -> None:
    job = make_job(store, FAILED, found("a.png", INSTANCE))
    data = json.loads(read(store, job, "coco"))
    assert [entry["id"] for entry in data["images"]] == [2]
    assert [entry["name"] for entry in data["categories"]] == ["cell", "other"]
    (annotation,) = data["annotations"]
    assert (annotation["image_id"], annotation["category_id"]) == (2, 9)
    assert annotation["segmentation"] == INSTANCE["segmentation"]


@pytest.mark.parametrize("wanted", get_args(FormatName))
def test_a_version_with_further_classes_may_have_come_since_the_job_was_made(
    store: JobStore, wanted: FormatName
) -> None:
    added = {**INSTANCE, "category_id": 2, "category": "spindle"}
    job = make_job(store, found("a.png", INSTANCE), found("b.png", added))
    assert read(store, job, wanted)
    data = json.loads(read(store, job, "coco"))
    assert [c["name"] for c in data["categories"]] == ["cell", "other", "spindle"]
    assert [a["category_id"] for a in data["annotations"]] == [9, 2]


@pytest.mark.parametrize(("asked", "expected"), [({}, 0.25), ({"um_per_px": 0.5}, 0.5)])
def test_the_size_of_a_pixel_is_that_of_the_file_unless_the_job_states_it(
    store: JobStore, asked: dict[str, float], expected: float
) -> None:
    properties = {**found("a.tif").properties, "um_per_px": 0.25}
    job = make_job(store, FileResult("m:1", properties, [INSTANCE]), parameters=asked)
    with zipfile.ZipFile(io.BytesIO(read(store, job, "ome-tiff"))) as archive:
        written = archive.read("masks/a.ome.tif")
    assert read_header(written).um_per_px == pytest.approx(expected)


@pytest.mark.parametrize("names", [["a.png", "a.jpg"], ["../../x.png", "/etc/y.png"]])
def test_files_of_a_zip_are_safe_and_different(store: JobStore, names: list[str]) -> None:
    job = make_job(store, *(found(name, INSTANCE) for name in names))
    with zipfile.ZipFile(io.BytesIO(read(store, job, "labelme"))) as archive:
        inside = archive.namelist()
    assert len(set(inside)) == 2
    assert all(name.startswith("images/") and ".." not in name for name in inside)


@pytest.mark.parametrize("wanted", ["json", "ndjson", "coco-results", "coco", "labelme"])
def test_a_job_that_is_deleted_meanwhile_is_not_one_without_results(
    store: JobStore, wanted: ResultFormat
) -> None:
    job = make_job(store, found("a.png", INSTANCE))
    none: list[Stored] = []
    answer = build_answer(job, lambda: iter(none), wanted, 0.0)
    with pytest.raises(UnknownJob, match="was deleted while"):
        list(answer.pieces)


def test_what_cannot_be_written_is_refused(store: JobStore) -> None:
    boxes = make_job(store, found("a.png"), parameters={"masks": "none"})
    with pytest.raises(InvalidParameter, match="csv needs a job with masks=rle"):
        read(store, boxes, "csv")
    job = make_job(store, found("a.png"))
    for wanted in ("json", "labels"):
        with pytest.raises(InvalidParameter, match="simplif"):
            build_answer(job, lambda: store.iterate_results(job.id), wanted, 1.0)
