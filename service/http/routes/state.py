"""What routes take from their application: there are no globals."""

from __future__ import annotations

import ipaddress
from asyncio import sleep
from functools import lru_cache
from typing import Annotated, cast

from fastapi import Depends, Request

from service.errors import Forbidden, Unauthorized
from service.http.keys import KeyRing, KeySpec
from service.protocol import Segmenter
from service.work.request import ClientProfile


async def get_segmenter(request: Request) -> Segmenter:
    """The application's segmenter."""
    return cast(Segmenter, request.app.state.segmenter)


SegmenterDep = Annotated[Segmenter, Depends(get_segmenter)]


async def find_key(request: Request) -> KeySpec | None:
    """The entry of the request's API key; None where the server asks for no keys.

    A valid key is accepted at once, however many wrong ones its address has sent.

    Raises:
        Unauthorized: The request has no key, or one that is not known.
        TooManyWrongKeys: The key is not known, nor were many others of its address.
    """
    ring = cast(KeyRing | None, request.app.state.keys)
    if ring is None:
        return None
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = request.headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else "")
    if not key:
        raise Unauthorized("an API key is needed: header X-API-Key, or a bearer token")
    spec = ring.find(key)
    if spec is None:
        await sleep(ring.wrong.count(_client_of(request).name))
        raise Unauthorized("the API key is not known")
    return spec


KeyDep = Annotated[KeySpec | None, Depends(find_key)]


async def find_client(request: Request) -> ClientProfile:
    """Client of a request: the holder of its API key, or else its peer address.

    Raises:
        Unauthorized: The server asks for keys, and the request has none that is known.
    """
    spec = await find_key(request)
    if spec is not None:
        return spec.client
    return _client_of(request)


def _client_of(request: Request) -> ClientProfile:
    return _client_at("" if request.client is None else request.client.host)


@lru_cache(maxsize=4096)
def _client_at(address: str) -> ClientProfile:
    """A client by address; of IPv6 addresses the /64 network, which is one client's.

    A socket for both families gives the addresses of IPv4 clients as `::ffff:a.b.c.d`.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return ClientProfile(name=address)
    if isinstance(parsed, ipaddress.IPv4Address):
        return ClientProfile(name=address)
    if parsed.ipv4_mapped is not None:
        return ClientProfile(name=str(parsed.ipv4_mapped))
    return ClientProfile(name=str(ipaddress.ip_network((parsed, 64), strict=False)))


ClientDep = Annotated[ClientProfile, Depends(find_client)]


async def require_admin(request: Request) -> None:
    """Refuses keys that may not change what is served.

    Raises:
        Forbidden: The key is not an administrator's.
    """
    spec = await find_key(request)
    if spec is not None and not spec.admin:
        raise Forbidden(f"key {spec.name!r} is not an administrator's")
