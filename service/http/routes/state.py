"""What routes take from their application: there are no globals."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from service.http.clients import check_admin, client_at, find_spec
from service.http.keys import KeyRing, KeySpec
from service.protocol import Segmenter
from service.work.request import ClientProfile


async def get_segmenter(request: Request) -> Segmenter:
    """The application's segmenter."""
    return cast(Segmenter, request.app.state.segmenter)


SegmenterDep = Annotated[Segmenter, Depends(get_segmenter)]


async def find_key(request: Request) -> KeySpec | None:
    """The entry of the request's API key; None where the server asks for no keys.

    Raises:
        Unauthorized, TooManyWrongKeys: See `find_spec`.
    """
    ring = cast(KeyRing | None, request.app.state.keys)
    return await find_spec(ring, request.headers, _address_of(request))


KeyDep = Annotated[KeySpec | None, Depends(find_key)]


async def find_client(request: Request) -> ClientProfile:
    """Client of a request: the holder of its API key, or else its peer address.

    Raises:
        Unauthorized: The server asks for keys, and the request has none that is known.
    """
    spec = await find_key(request)
    return client_at(_address_of(request)) if spec is None else spec.client


def _address_of(request: Request) -> str:
    return "" if request.client is None else request.client.host


ClientDep = Annotated[ClientProfile, Depends(find_client)]


async def require_admin(request: Request) -> None:
    """Refuses keys that may not change what is served.

    Raises:
        Forbidden: The key is not an administrator's.
    """
    check_admin(await find_key(request))
