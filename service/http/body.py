"""Reads bodies: refuses encodings before anything is read, and keeps large copies off the loop."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from service.errors import BodyTooLarge, UnsupportedEncoding

_LARGE_BYTES = 2**20


async def check_encoding(request: Request) -> None:
    """Accepts a body that is not compressed.

    Raises:
        UnsupportedEncoding: Names the Content-Encoding.
    """
    encodings = ",".join(request.headers.getlist("content-encoding")).split(",")
    for encoding in encodings:
        if encoding.strip().lower() not in ("", "identity"):
            raise UnsupportedEncoding(
                f"Content-Encoding {encoding.strip()!r} is not supported; send the body as it is"
            )


async def read_body(request: Request, max_bytes: int | None = None) -> bytes:
    """The complete body.

    Args:
        request: Its body must not have been read.
        max_bytes: Limit of this route, below that of the server.

    Raises:
        UnsupportedEncoding: The body is compressed.
        BodyTooLarge: It has more than `max_bytes`.
    """
    await check_encoding(request)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if max_bytes is not None and size > max_bytes:
            raise BodyTooLarge(f"the body has at least {size} bytes, the limit is {max_bytes}")
        chunks.append(chunk)
    return await join(chunks, size)


async def join(chunks: list[bytes], size: int) -> bytes:
    """One copy of the chunks, `size` bytes together; a large one is made in a thread."""
    if size < _LARGE_BYTES:
        return b"".join(chunks)
    return await asyncio.to_thread(b"".join, chunks)
