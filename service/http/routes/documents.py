"""Answers of POST /segment in an output format: a file, or several in a ZIP."""

from __future__ import annotations

import base64
import copy
import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import orjson
from starlette.responses import Response, StreamingResponse

from pipeline.errors import WriteError
from pipeline.writers import FORMATS, OutputFormat, choose_writer, name_files
from service.errors import InvalidParameter
from service.http.schemas import SegmentQuery
from service.protocol import Segmented
from service.work.request import ImageFile, Outcome

FILE_TYPES = sorted(
    {format.media_type for format in FORMATS.values()} - {"application/json"} | {"application/zip"}
)
"""Media types of files, beside JSON."""
_CHUNK_BYTES = 1 << 16
_NO_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class DocumentAnswer:
    """How a request's images become its answer.

    Attributes:
        format: The output format.
        names: The client's names of the images.
    """

    format: OutputFormat
    names: Sequence[str | None]

    def respond(self, segmented: Segmented) -> Response:
        """The answer, sent while it is written.

        Raises:
            Exception: The error of an image that failed.
        """
        chunks, name, media_type = self._write(segmented)
        headers = {
            **describe_warnings(segmented.outcomes),
            "content-disposition": f"attachment; {describe_name(name)}",
        }
        return StreamingResponse(chunks, media_type=media_type, headers=headers)

    def build_line(self, segmented: Segmented) -> bytes:
        """The answer as JSON, for the last line of application/x-ndjson.

        Raises:
            Exception: The error of an image that failed.
        """
        chunks, name, media_type = self._write(segmented)
        data = base64.b64encode(b"".join(chunks)).decode()
        warnings = [[*outcome.warnings] for outcome in segmented.outcomes]
        return orjson.dumps(
            {"file_name": name, "media_type": media_type, "base64": data, "warnings": warnings}
        )

    def _write(self, segmented: Segmented) -> tuple[Iterator[bytes], str, str]:
        """The pieces of the file, its name and its media type."""
        parts = [
            _only_page(outcome, number, self.names)
            for number, outcome in enumerate(segmented.outcomes)
        ]
        classes = segmented.model.config.classes
        stems = name_files((name or "image" for name in self.names), self.format.suffix)
        if self.format.join is None and len(parts) > 1:
            folder = f"{self.format.folder}/" if self.format.folder else ""
            files = {
                f"{folder}{stem}{self.format.suffix}": part
                for stem, part in zip(stems, parts, strict=True)
            }
            files |= self.format.add_files(classes)
            return gather(zip_files(files.items())), f"{self.format.name}.zip", "application/zip"
        last = stems[0].rpartition("/")[2] if len(parts) == 1 else "results"
        name = f"{last}{self.format.suffix}"
        if self.format.join is None:
            return iter(parts), name, self.format.media_type
        return gather(self.format.join(classes, enumerate(parts, 1))), name, self.format.media_type


def choose_document(query: SegmentQuery, images: Sequence[ImageFile]) -> DocumentAnswer | None:
    """The answer that a request's `format` asks for; None for JSON or a picture.

    Raises:
        InvalidParameter: The format cannot be written here, or not with the other parameters.
    """
    if query.format is None:
        if query.simplify_px:
            raise InvalidParameter("simplify_px: it needs a format that has outlines")
        return None
    if "masks" in query.model_fields_set:
        raise InvalidParameter(f"masks: the format {query.format} has its own masks; leave it out")
    try:
        chosen = choose_writer(query.format, query.simplify_px)
    except WriteError as error:
        raise InvalidParameter(f"format: {error}") from error
    return DocumentAnswer(chosen, [image.file_name for image in images])


def _only_page(outcome: Outcome, number: int, names: Sequence[str | None]) -> bytes:
    """The page of an image; raises the error of one that failed, which names it among several."""
    error = outcome.error
    if error is None:
        return outcome.payload
    if len(names) > 1:
        error = copy.copy(error)
        error.args = (f"image {number + 1} ({names[number]!r}): {error}", *error.args[1:])
    raise error


def describe_warnings(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """The headers of an answer that is no JSON: with the codes of the images' warnings, if any."""
    codes = sorted({code for outcome in outcomes for code in outcome.warnings})
    return {"vary": "accept"} | ({"x-solo-warnings": ", ".join(codes)} if codes else {})


def describe_name(name: str) -> str:
    """The file name of a Content-Disposition header, for old and new clients."""
    plain = name.encode("ascii", "replace").decode().replace("?", "_").replace('"', "_")
    return f"filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


def gather(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that are worth sending."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _CHUNK_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)


class _Pieces(io.RawIOBase):
    """A file that only collects what is written."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """What has come since the last call."""
        data = b"".join(self.pieces)
        self.pieces.clear()
        return data


def zip_files(files: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """A ZIP of files, by name, which is the same whenever it is written."""
    out = _Pieces()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files:
            packed = not name.endswith((".png", ".tif", ".zip"))
            kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name, _NO_DATE), data, kind)
            yield out.take()
    yield out.take()
