"""Who has sent a request: the holder of an API key, or else a peer address."""

from __future__ import annotations

import ipaddress
from asyncio import sleep
from collections.abc import Mapping
from functools import lru_cache

from service.errors import Forbidden, Unauthorized
from service.http.keys import KeyRing, KeySpec
from service.work.request import ClientProfile


async def find_spec(
    ring: KeyRing | None, headers: Mapping[str, str], address: str
) -> KeySpec | None:
    """The entry of a request's API key; None where the server asks for no keys.

    A valid key is accepted at once, however many wrong ones its address has sent.

    Args:
        ring: The server's keys.
        headers: The request's; names in lower case.
        address: Its peer's.

    Raises:
        Unauthorized: The request has no key, or one that is not known.
        TooManyWrongKeys: The key is not known, nor were many others of its address.
    """
    if ring is None:
        return None
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else "")
    if not key:
        raise Unauthorized("an API key is needed: header X-API-Key, or a bearer token")
    spec = ring.find(key)
    if spec is None:
        await sleep(ring.wrong.count(client_at(address).name))
        raise Unauthorized("the API key is not known")
    return spec


def check_admin(spec: KeySpec | None) -> None:
    """Refuses keys that may not change what is served.

    Raises:
        Forbidden: The key is not an administrator's.
    """
    if spec is not None and not spec.admin:
        raise Forbidden(f"key {spec.name!r} is not an administrator's")


def find_origin(peer: str, forwarded: str, trusted: str) -> str:
    """The address that a request comes from, as uvicorn finds it for HTTP.

    Args:
        peer: Address at the other end of the connection.
        forwarded: X-Forwarded-For; each proxy appends the address that it sees.
        trusted: Setting `trusted_proxies`.
    """
    hops = [hop.strip() for hop in forwarded.split(",") if hop.strip()]
    if not hops or not _is_trusted(peer, trusted):
        return peer
    others = [hop for hop in hops if not _is_trusted(hop, trusted)]
    return others[-1] if others else hops[0]


@lru_cache(maxsize=4096)
def _is_trusted(address: str, trusted: str) -> bool:
    if trusted == "*":
        return True
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in ipaddress.ip_network(part.strip()) for part in trusted.split(","))


@lru_cache(maxsize=4096)
def client_at(address: str) -> ClientProfile:
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
