"""Multipart forms (RFC 7578): image files, and parameters as text fields.

Names, values and file names are UTF-8. A charset that the request names is ignored, as RFC 7578
knows none; it must never choose a codec.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, Collection, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from multipart import (
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from service.errors import EmptyBody, InvalidMultipart, InvalidParameter, TooManyImages
from service.http.body import join
from service.work.request import ImageFile

PART_NAME = "images"
_MAX_BOUNDARY = 200
_MAX_FIELD_BYTES = 4096
_ENCODED = ("Content-Encoding", "Content-Transfer-Encoding")
_PLAIN = ("binary", "8bit", "7bit", "identity")
_EXTENDED = re.compile(r';\s*([^\s;="]+)\s*=\s*(?:"[^"\\]*(?:\\.[^"\\]*)*"|([^;"]*))')
"""A parameter of Content-Disposition; group 2 is its value if it is not quoted."""


@dataclass
class _Part:
    """A part that is being received.

    Attributes:
        name: Its field's.
        is_file: Whether it has a file name, if only an empty one.
        file_name: None if it is empty or missing.
    """

    name: str
    is_file: bool
    file_name: str | None
    chunks: list[bytes] = field(default_factory=list)
    size: int = 0


class ImageForm:
    """Collects the parts of a body that is fed to it in chunks.

    Args:
        content_type: The request's header, which names the boundary.
        parameters: Names of text fields that are accepted.
        max_files: Most images.

    Attributes:
        fields: The text fields by name.
        files: The image files.

    Raises:
        InvalidMultipart: The header names no boundary, or too long a one.
    """

    def __init__(self, content_type: str, parameters: Collection[str], max_files: int) -> None:
        boundary = parse_options_header(content_type)[1].get("boundary", "")
        if not 0 < len(boundary) <= _MAX_BOUNDARY:
            raise InvalidMultipart(
                f"Content-Type must name a boundary of 1 to {_MAX_BOUNDARY} characters, "
                f"not {boundary[:_MAX_BOUNDARY]!r}"
            )
        self.fields: dict[str, str] = {}
        self.files: list[_Part] = []
        self._parameters = parameters
        self._max_files = max_files
        self._part: _Part | None = None
        self._opening = b"\r\n--" + boundary.encode("latin-1")
        self._preamble: bytes | None = b"\r\n"
        try:
            self._parser = PushMultipartParser(boundary.encode("latin-1"))
        except MultipartError as error:
            raise _describe(error) from error

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes of the body.

        Raises:
            InvalidMultipart: The body is malformed, or a name or value is not UTF-8.
            InvalidParameter: A field is unknown, or repeated.
            TooManyImages: More files than allowed.
        """
        if self._preamble is not None:
            chunk = self._skip_preamble(self._preamble + chunk)
        if not chunk:  # to the parser it would be the end
            return
        try:
            for event in self._parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    self._begin(event)
                elif event is None:
                    self._end()
                else:
                    self._extend(event)
        except MultipartError as error:
            raise _describe(error) from error

    def _skip_preamble(self, received: bytes) -> bytes:
        """What was received from the first boundary on; before that the parser's rules vary."""
        at = received.find(self._opening)
        if at < 0:
            self._preamble = received[-len(self._opening) + 1 :]
            return b""
        self._preamble = None
        return received[at + 2 :]

    def finish(self) -> None:
        """Checks that the body was complete.

        Raises:
            InvalidMultipart: Its final boundary has not come.
        """
        try:
            self._parser.close()
        except MultipartError as error:
            what = "" if self._part is None else f"; the part {self._part.name!r} is cut"
            raise InvalidMultipart(
                f"the multipart body ends before its final boundary{what}"
            ) from error

    def _begin(self, segment: MultipartSegment) -> None:
        name, header = segment.name or "", segment.header("Content-Disposition") or ""
        headers = [known for known, _ in segment.headerlist]
        if len(set(headers)) < len(headers):
            raise InvalidMultipart(f"the part {name!r} repeats a header: {', '.join(headers)}")
        if any("\n" in value for _, value in segment.headerlist):
            raise InvalidMultipart(f"a header of the part {name!r} has a bare line feed")
        extended = _read_extended_name(header)
        file_name = segment.filename if extended is None else extended
        for encoding in _ENCODED:
            value = str(segment.header(encoding) or "identity").strip()
            if value.lower() not in _PLAIN:
                raise InvalidMultipart(f"{encoding} {value!r} of the part {name!r} is not read")
        if file_name is not None and name != PART_NAME:
            raise InvalidMultipart(f"a file part is named {name!r}, expected {PART_NAME!r}")
        if file_name is not None and len(self.files) == self._max_files:
            raise TooManyImages(f"one request may have {self._max_files} images")
        if file_name is None:
            self._check_field(name)
        self._part = _Part(name, file_name is not None, file_name or None)

    def _check_field(self, name: str) -> None:
        if name == PART_NAME:
            raise InvalidMultipart(f"the part {PART_NAME!r} must be a file part, with a file name")
        if name not in self._parameters:
            raise InvalidParameter(
                f"there is no form field {name!r}, only the files {PART_NAME!r} and "
                f"{', '.join(sorted(self._parameters))}; other parameters must be in the query"
            )
        if name in self.fields:
            raise InvalidParameter(f"the form field {name!r} is given more than once")

    def _extend(self, chunk: bytes) -> None:
        assert self._part is not None
        self._part.chunks.append(chunk)
        self._part.size += len(chunk)
        if not self._part.is_file and self._part.size > _MAX_FIELD_BYTES:
            raise InvalidMultipart(
                f"the form field {self._part.name!r} has more than {_MAX_FIELD_BYTES} bytes"
            )

    def _end(self) -> None:
        part, self._part = self._part, None
        assert part is not None
        if part.is_file:
            self.files.append(part)
            return
        try:
            self.fields[part.name] = b"".join(part.chunks).decode()
        except UnicodeDecodeError as error:
            raise InvalidMultipart(f"the form field {part.name!r} is not UTF-8: {error}") from error


def _describe(error: MultipartError) -> InvalidMultipart:
    text = error.args[0] if error.args else "malformed"
    return InvalidMultipart(f"the multipart body cannot be read: {text}")


def _read_extended_name(header: str) -> str | None:
    """The file name of `filename*=UTF-8''...` (RFC 5987), which goes before `filename`.

    Raises:
        InvalidMultipart: It is not UTF-8, or in several pieces (RFC 2231).
    """
    found = None
    for name, value in _EXTENDED.findall(header):
        if not name.lower().startswith("filename*"):
            continue
        charset, _, rest = value.strip().partition("'")
        _, quote, encoded = rest.partition("'")
        if name.lower() != "filename*" or not quote or charset.lower() != "utf-8":
            raise InvalidMultipart(f"a file name must be {name[:9]}=UTF-8''..., not {name}={value}")
        try:
            found = unquote_to_bytes(encoded).decode()
        except UnicodeDecodeError as error:
            raise InvalidMultipart(f"the file name {encoded!r} is not UTF-8: {error}") from error
    return found


async def read_form(
    content_type: str, body: AsyncIterable[bytes], parameters: Collection[str], max_files: int
) -> tuple[Sequence[ImageFile], dict[str, str]]:
    """The images and the text fields of a form.

    Args:
        content_type: The request's header.
        body: Chunks of the body.
        parameters: Names of text fields that are accepted.
        max_files: Most images.

    Raises:
        EmptyBody: There are no bytes.
        InvalidMultipart, InvalidParameter, TooManyImages: See `ImageForm`; also without a file.
    """
    form = ImageForm(content_type, parameters, max_files)
    empty = True
    async for chunk in body:
        empty = empty and not chunk
        form.feed(chunk)
    if empty:
        raise EmptyBody(f"the body is empty; send parts named {PART_NAME!r}")
    form.finish()
    if not form.files:
        raise InvalidMultipart(
            f"no file part is named {PART_NAME!r} (with a file name); the parts are "
            f"{sorted(form.fields)}"
        )
    return [
        ImageFile(part.file_name, await join(part.chunks, part.size)) for part in form.files
    ], form.fields
