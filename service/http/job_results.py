"""The results of a job: entries as of POST /segment, COCO results, or files of other programs.

They are written as they are read from the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, get_args

import orjson

from pipeline.encode import instance_from_coco
from pipeline.errors import WriteError
from pipeline.model_config import ClassSpec
from pipeline.writers import Classes, FormatName, OutputFormat, Page, choose_writer, name_files
from service.errors import InvalidParameter, UnknownJob
from service.http.routes.documents import gather, zip_files
from service.jobs.records import JobRecord

EntryFormat = Literal["json", "ndjson", "coco-results"]
ResultFormat = EntryFormat | FormatName
Stored = tuple[int, bytes, bytes]
"""Number of a file, its entry as a JSON object, and its instances as a JSON list."""
ReadResults = Callable[[], Iterator[Stored]]
"""Begins to read the results, whenever it is called."""


@dataclass(frozen=True)
class ResultAnswer:
    """An answer.

    Attributes:
        media_type: Of the answer.
        file_name: To save it under; None: it is shown.
        pieces: The answer.
    """

    media_type: str
    file_name: str | None
    pieces: Iterator[bytes]


def build_answer(
    job: JobRecord, read: ReadResults, wanted: ResultFormat, simplify_px: float
) -> ResultAnswer:
    """The results of a job in a format.

    Args:
        job: It is done.
        read: Reads its results.
        wanted: The format.
        simplify_px: Outlines of the format may be off so far.

    Raises:
        InvalidParameter: The format cannot be written here, or not of this job.
    """
    read = partial(_read_all, job, read)
    if wanted in get_args(EntryFormat):
        if simplify_px:
            raise InvalidParameter(f"simplify_px: the format {wanted} has no outlines")
        write = {"json": _write_json, "ndjson": _write_ndjson, "coco-results": _write_coco}[wanted]
        kind = "application/x-ndjson" if wanted == "ndjson" else "application/json"
        return ResultAnswer(kind, None, gather(write(job, read())))
    try:
        chosen = choose_writer(wanted, simplify_px)
    except WriteError as error:
        raise InvalidParameter(f"format: {error}") from error
    if job.options.parameters.get("masks", "rle") != "rle":
        raise InvalidParameter(f"format: {wanted} needs a job with masks=rle")
    document = _Document(job, read, chosen, simplify_px)
    suffix = ".zip" if chosen.join is None else chosen.suffix
    kind = "application/zip" if chosen.join is None else chosen.media_type
    return ResultAnswer(kind, f"{job.id}{suffix}", gather(document.write()))


def _read_all(job: JobRecord, read: ReadResults) -> Iterator[Stored]:
    """The results; fails, so that the answer is cut, if the job was deleted meanwhile."""
    count = 0
    for stored in read():
        count += 1
        yield stored
    if count != job.files:
        raise UnknownJob(f"job {job.id} was deleted while its results were read")


def _write_entry(stored: Stored) -> bytes:
    number, properties, instances = stored
    entry = {"number": number, **orjson.loads(properties)}
    if "error" not in entry:
        entry["instances"] = orjson.Fragment(instances)
    return orjson.dumps(entry)


def _write_json(job: JobRecord, results: Iterable[Stored]) -> Iterator[bytes]:
    yield b'{"id":%s,"results":[' % orjson.dumps(job.id)
    for index, stored in enumerate(results):
        yield (b",\n" if index else b"\n") + _write_entry(stored)
    yield b"\n]}\n"


def _write_ndjson(job: JobRecord, results: Iterable[Stored]) -> Iterator[bytes]:
    for stored in results:
        yield _write_entry(stored) + b"\n"


def _write_coco(job: JobRecord, results: Iterable[Stored]) -> Iterator[bytes]:
    """A list of COCO results; the image id is the file's number."""
    yield b"["
    separator = b"\n"
    for number, properties, instances in results:
        named = {"image_id": number, "file_name": orjson.loads(properties)["file_name"]}
        for instance in orjson.loads(instances):
            yield separator + orjson.dumps({**named, **instance})
            separator = b",\n"
    yield b"\n]\n"


@dataclass(frozen=True)
class _Document:
    """The files of a job without an error, in an output format."""

    job: JobRecord
    read: ReadResults
    format: OutputFormat
    simplify_px: float

    @cached_property
    def _classes(self) -> Classes:
        """Those of the model when the job was made, and then those that other versions found."""
        names = {spec["category_id"]: spec["name"] for spec in self.job.options.classes}
        found = {
            instance["category_id"]: instance["category"]
            for _, _, instances in self._found()
            for instance in orjson.loads(instances)
        }
        names |= {number: found[number] for number in sorted(found) if number not in names}
        return tuple(ClassSpec(category_id=number, name=name) for number, name in names.items())

    def write(self) -> Iterator[bytes]:
        """The document, or a ZIP with a file for each image."""
        if self.format.join is not None:
            pages = ((number, self.format.encode(page)) for number, page in self._pages())
            yield from self.format.join(self._classes, pages)
        else:
            yield from zip_files(self._files())

    def _files(self) -> Iterator[tuple[str, bytes]]:
        names = [entry["file_name"] for _, entry, _ in self._found()]
        folder = f"{self.format.folder}/" if self.format.folder else ""
        yield from self.format.add_files(self._classes).items()
        for stem, (_, page) in zip(
            name_files(names, self.format.suffix), self._pages(), strict=True
        ):
            yield f"{folder}{stem}{self.format.suffix}", self.format.encode(page)

    def _pages(self) -> Iterator[tuple[int, Page]]:
        classes = self._classes
        labels = {spec.category_id: label for label, spec in enumerate(classes)}
        for number, entry, instances in self._found():
            found = orjson.loads(instances)
            yield (
                number,
                Page(
                    name=entry["file_name"],
                    image_hw=(entry["height"], entry["width"]),
                    instances=[instance_from_coco(i, labels[i["category_id"]]) for i in found],
                    classes=classes,
                    simplify_px=self.simplify_px,
                    um_per_px=self.job.options.parameters.get("um_per_px")
                    or entry.get("um_per_px"),
                ),
            )

    def _found(self) -> Iterator[tuple[int, dict[str, Any], bytes]]:
        for number, properties, instances in self.read():
            entry = orjson.loads(properties)
            if "error" not in entry:
                yield number, entry, instances
