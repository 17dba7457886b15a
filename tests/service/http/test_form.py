from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import (
    EmptyBody,
    InvalidMultipart,
    InvalidParameter,
    ServiceError,
    TooManyImages,
)
from service.http.form import ImageForm, read_form

TYPE = "multipart/form-data; boundary=x"
PARAMETERS = ("masks", "score_threshold")
Read = tuple[list[tuple[str | None, bytes]], dict[str, str]]


def part(disposition: bytes, data: bytes = b"ab", *headers: bytes) -> bytes:
    lines = [b"--x", b"Content-Disposition: form-data; " + disposition, *headers, b"", data, b""]
    return b"\r\n".join(lines)


def image(name: bytes = b"a.png", data: bytes = b"ab") -> bytes:
    return part(b'name="images"; filename="%b"' % name, data)


def field(name: bytes, value: bytes) -> bytes:
    return part(b'name="%b"' % name, value)


END = b"--x--\r\n"
BODY = image(b"1", b"\r\n--x\n--\r\n-") + field(b"masks", b"rle") + image(b"2", b"") + END


async def read(body: bytes, content_type: str = TYPE, step: int = 1 << 20) -> Read:
    async def send() -> AsyncIterator[bytes]:
        for at in range(0, len(body), step):
            yield body[at : at + step]
        yield b""

    files, fields = await read_form(content_type, send(), PARAMETERS, max_files=3)
    assert all(isinstance(file.data, bytes) for file in files)
    return [(file.file_name, bytes(file.data)) for file in files], fields


@pytest.mark.parametrize("step", [*range(1, 30), 1000])
async def test_files_and_fields_are_read_however_they_arrive(step: int) -> None:
    # A line that begins with the boundary and goes on is not allowed in a part.
    body = BODY.replace(b"\r\n--x\n--", b"\r\n--y\n--")
    assert await read(body, step=step) == (
        [("1", b"\r\n--y\n--\r\n-"), ("2", b"")],
        {"masks": "rle"},
    )


async def test_a_boundary_that_goes_on_is_not_taken_for_data_nor_for_an_end() -> None:
    for step in (1, 7, 1000):
        with pytest.raises(InvalidMultipart, match="bytes after boundary"):
            await read(BODY, step=step)


async def test_a_body_that_is_cut_anywhere_is_refused() -> None:
    body = image(b"1") + field(b"masks", b"rle") + image(b"2") + END
    for length in range(1, len(body) - 2):
        with pytest.raises(InvalidMultipart):
            await read(body[:length])
    assert len((await read(body[:-2]))[0]) == 2
    with pytest.raises(InvalidMultipart, match="before its final boundary; the part 'images' is"):
        await read(image(b"1") + image(b"2")[:-3])
    with pytest.raises(EmptyBody):
        await read(b"")


async def test_preamble_and_epilogue_are_ignored() -> None:
    body = b"This is a multi-part message.\r\n" + image() + END + b"\r\nThat was it.\r\n--x\r\n"
    for step in (1, 5, 1000):
        assert await read(body, step=step) == ([("a.png", b"ab")], {})


@pytest.mark.parametrize("preamble", [b"a\n--x\r\n\r\n", b"--y\r\n", b"\r\n", b"-", b"a--x--\r\n"])
@pytest.mark.parametrize("step", [1, 2, 5, 1000])
async def test_only_a_line_of_its_own_opens_the_first_part(preamble: bytes, step: int) -> None:
    body = preamble + b"\r\n" + image() + END
    assert await read(body, step=step) == ([("a.png", b"ab")], {})
    with pytest.raises(InvalidMultipart):
        await read(preamble + image() + END[:-4], step=step)


@pytest.mark.parametrize(
    "charset",
    ["utf-7", "punycode", "idna", "unicode_escape", "zip", "undefined", "utf-16", "latin-1", "?"],
)
async def test_a_charset_is_ignored(charset: str) -> None:
    content_type = f"multipart/form-data; charset={charset}; boundary=x"
    name = "é+AGE-\\u0061.png"
    body = part(
        b'name="images"; filename="%b"' % name.encode(),
        b"ab",
        f"Content-Type: image/png; charset={charset}".encode(),
    )
    body += field(b"masks", b"+AGE-") + END
    assert await read(body, content_type) == ([(name, b"ab")], {"masks": "+AGE-"})


@pytest.mark.parametrize("wrong", [b"\xff", b"\xe9.png", b"\xed\xa0\x80", b"\xc0\xaf", b"a\xf0"])
async def test_what_is_not_utf_8_is_refused(wrong: bytes) -> None:
    for body in (
        image(wrong),
        part(b'name="' + wrong + b'"'),
        image() + field(b"masks", wrong),
        part(b"name=images; filename*=UTF-8''" + b"".join(b"%%%02x" % byte for byte in wrong)),
    ):
        with pytest.raises(InvalidMultipart, match=r"UTF-8|decode"):
            await read(body + END)


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b"name=images; filename=a.png", "a.png"),
        (b'name="images"; filename="a \\"b\\".png"', 'a "b".png'),
        (b'name="images"; filename="a%22b%0D.png"', 'a"b\r.png'),
        (b'name="images"; filename=""', None),
        (b"name=\"images\"; filename*=UTF-8''%E7%BB%86.jpg", "细.jpg"),
        (b'name="images"; filename="?.jpg"; filename*=utf-8\'zh\'%E7%BB%86.jpg', "细.jpg"),
        (b'filename*=utf-8\'\'b; name="images"; filename="a"', "b"),
        (b'name="images"; filename="a; filename*=UTF-8\'\'b"', "a; filename*=UTF-8''b"),
        (b'name="images"; filename="C:\\dir\\a.png"', "a.png"),
        ('name="images"; filename="😀\u202e.png"'.encode(), "😀\u202e.png"),
    ],
)
async def test_file_names(disposition: bytes, name: str | None) -> None:
    for step in (1, 1000):
        assert await read(part(disposition) + END, step=step) == ([(name, b"ab")], {})


@pytest.mark.parametrize(
    ("body", "error", "named"),
    [
        (part(b"name=images; filename*=iso-8859-1''%e9"), InvalidMultipart, "iso-8859-1"),
        (part(b"name=images; filename*=punycode''a"), InvalidMultipart, "punycode"),
        (part(b"name=images; filename*0*=UTF-8''a"), InvalidMultipart, r"filename\*0\*"),
        (part(b"name=images; filename*=a"), InvalidMultipart, r"filename\*=a"),
        (field(b"mask", b"rle"), InvalidParameter, "'mask'"),
        (field(b"model", b"a"), InvalidParameter, "'model'.* in the query"),
        (field(b"", b"a"), InvalidParameter, "''"),
        (field(b"masks", b"a") * 2, InvalidParameter, "'masks' is given more than once"),
        (field(b"masks", b"a" * 4097), InvalidMultipart, "'masks' has more than 4096 bytes"),
        (field(b"images", b"a"), InvalidMultipart, "'images' must be a file part"),
        (part(b'name="image"; filename="a"'), InvalidMultipart, "'image', expected 'images'"),
        (image() * 4, TooManyImages, "3 images"),
        (field(b"masks", b"a"), InvalidMultipart, r"no file part.*\['masks'\]"),
        (part(b"name=a", b"", b"Content-Disposition: form-data; name=b"), InvalidMultipart, "rep"),
        (part(b'name=images; filename="a\nb"'), InvalidMultipart, "line feed|line break"),
        (
            part(b"name=images; filename=a", b"", b"A: a\nb"),
            InvalidMultipart,
            "line feed|line break",
        ),
        (b"--x\r\nContent-Type: text/plain\r\n\r\n\r\n", InvalidMultipart, "Disposition"),
        (b"--x\r\nContent-Disposition: file; name=a\r\n\r\n\r\n", InvalidMultipart, "type"),
        (b"--x\r\n" + b"A: b\r\n" * 100 + b"\r\n", InvalidMultipart, "header"),
        (b"--x\r\nA: " + b"b" * 10_000, InvalidMultipart, "header"),
    ],
)
async def test_what_is_wrong_is_named(body: bytes, error: type[ServiceError], named: str) -> None:
    for step in (1, 1000):
        with pytest.raises(error, match=named):
            await read(body + END, step=step)


@pytest.mark.parametrize("encoding", [b"base64", b"quoted-printable", b"gzip"])
@pytest.mark.parametrize("header", [b"Content-Transfer-Encoding", b"content-encoding"])
async def test_an_encoded_part_is_refused(header: bytes, encoding: bytes) -> None:
    disposition = b'name="images"; filename="a"'
    with pytest.raises(InvalidMultipart, match=encoding.decode()):
        await read(part(disposition, b"YQ==", header + b": " + encoding) + END)
    plain = part(disposition, b"ab", header + b": Binary") + END
    assert await read(plain) == ([("a", b"ab")], {})


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=" + "x" * 201,
        "multipart/form-data; boundary",
    ],
)
def test_a_boundary_is_needed(content_type: str) -> None:
    with pytest.raises(InvalidMultipart, match="boundary"):
        ImageForm(content_type, PARAMETERS, 1)


async def test_a_boundary_may_be_quoted_and_of_any_characters() -> None:
    body = (image() + END).replace(b"--x", b"--\xe9 (?)")
    assert await read(body, 'Multipart/Form-Data; boundary="é (?)"') == ([("a.png", b"ab")], {})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=3), st.integers(1, 50))
def test_any_bytes_come_through(files: list[bytes], step: int) -> None:
    body = b"".join(image(b"a", data) for data in files) + END
    form = ImageForm(TYPE, PARAMETERS, 3)
    for at in range(0, len(body), step):
        form.feed(body[at : at + step])
    form.finish()
    if not any(b"\r\n--x" in b"\r\n" + data for data in files):
        assert [b"".join(part.chunks) for part in form.files] == files
