"""Formats of a job's results, written as they are read.

A further format is a function in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import orjson

from service.jobs.records import JobRecord

Format = Literal["json", "ndjson", "coco"]
Stored = tuple[int, bytes, bytes]
"""Number of a file, its entry as a JSON object, and its instances as a JSON list."""
_CHUNK_BYTES = 64 * 1024


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
    """COCO results; the image id is the file's number. Files that failed have none."""
    yield b"["
    separator = b"\n"
    for number, properties, instances in results:
        named = {"image_id": number, "file_name": orjson.loads(properties)["file_name"]}
        for instance in orjson.loads(instances):
            yield separator + orjson.dumps({**named, **instance})
            separator = b",\n"
    yield b"\n]\n"


@dataclass(frozen=True)
class ResultFormat:
    """A format.

    Attributes:
        media_type: Of the answer.
        write: Yields the answer in parts, of any size.
    """

    media_type: str
    write: Callable[[JobRecord, Iterable[Stored]], Iterator[bytes]]

    def stream(self, job: JobRecord, results: Iterable[Stored]) -> Iterator[bytes]:
        """The answer in parts of a good size to send."""
        parts, size = list[bytes](), 0
        for part in self.write(job, results):
            parts.append(part)
            size += len(part)
            if size >= _CHUNK_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
        if parts:
            yield b"".join(parts)


FORMATS: Mapping[Format, ResultFormat] = {
    "json": ResultFormat("application/json", _write_json),
    "ndjson": ResultFormat("application/x-ndjson", _write_ndjson),
    "coco": ResultFormat("application/json", _write_coco),
}
