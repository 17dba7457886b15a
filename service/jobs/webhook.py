"""Webhooks: a signed POST that says that a job is done.

The request follows https://www.standardwebhooks.com, so receivers can check it with a library:
`webhook-id` (the job's id, the same in every attempt), `webhook-timestamp` and
`webhook-signature: v1,<base64 of HMAC-SHA256 of "id.timestamp.body">`.

A URL comes from a client, so it must not lead to what the client cannot reach itself: its host must
be in the settings, its addresses public unless the settings allow others, and redirects are not
followed. The addresses are resolved once, and the connection goes to the one that was checked.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch

import httpx

from service.errors import InvalidParameter, SourceForbidden, StartupError
from service.jobs.errors import describe

TIMEOUT_S = 15.0
"""Of one attempt, from the name's resolution to the answer's status."""
ATTEMPTS = 12
"""After these, which take about an hour, a webhook has failed."""
_FIRST_WAIT_S = 2.0
_MOST_URL = 2048
_SECRET_BYTES = 24
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SCHEMES = {"http": 80, "https": 443}

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class NotDelivered(Exception):
    """An attempt failed; the text gives the reason."""


def wait_s(attempt: int) -> float:
    """Seconds between an attempt, counted from 1, and the next one."""
    return _FIRST_WAIT_S * 2.0 ** (attempt - 1)


@dataclass(frozen=True)
class Webhooks:
    """What webhooks are allowed, and how they are signed.

    Attributes:
        secret: Key of the signature; empty: there are no webhooks.
        hosts: Patterns of allowed hosts, such as "*.example.com".
        allow_private: Addresses need not be public.
        clock: Wall clock, seconds, of the time stamps.
    """

    secret: bytes
    hosts: tuple[str, ...]
    allow_private: bool = False
    clock: Callable[[], float] = time.time

    def check(self, url: str) -> None:
        """Checks a URL when a job is submitted.

        Raises:
            InvalidParameter: It is no URL of HTTP.
            SourceForbidden: The settings allow no webhooks, or not this host.
        """
        parsed = _parse(url)
        if not self.secret:
            raise SourceForbidden("webhook: the server sends none; it has no secret to sign them")
        host = parsed.host.lower().rstrip(".")
        if not any(fnmatch(host, pattern) for pattern in self.hosts):
            raise SourceForbidden(f"webhook: the host {host!r} is not allowed")

    def sign(self, message_id: str, timestamp: int, body: bytes) -> str:
        """The header `webhook-signature`."""
        content = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
        digest = hmac.digest(self.secret, content, hashlib.sha256)
        return f"v1,{base64.b64encode(digest).decode()}"

    async def send(self, url: str, message_id: str, body: bytes) -> None:
        """Makes one attempt.

        Raises:
            NotDelivered: The answer is not 2xx, or there is none in time.
        """
        try:
            self.check(url)  # the settings may have changed
            async with asyncio.timeout(TIMEOUT_S):
                status = await self._post(_parse(url), message_id, body)
        except (InvalidParameter, SourceForbidden) as error:
            raise NotDelivered(str(error)) from error
        except TimeoutError as error:
            raise NotDelivered(f"no answer within {TIMEOUT_S:g} s") from error
        except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotDelivered(describe(error)) from error
        if not 200 <= status < 300:
            raise NotDelivered(f"status {status}")

    async def _post(self, url: httpx.URL, message_id: str, body: bytes) -> int:
        port = url.port or _SCHEMES[url.scheme]
        address = await self._resolve(url.host, port)
        timestamp = int(self.clock())
        headers = {
            "host": url.netloc.decode("ascii"),
            "content-type": "application/json",
            "user-agent": "solo-serve",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": self.sign(message_id, timestamp, body),
        }
        # The certificate is checked for the host's name, not for the address.
        extensions = {"sni_hostname": url.host}
        target = url.copy_with(host=str(address))
        async with (
            httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=TIMEOUT_S) as client,
            client.stream(
                "POST", target, content=body, headers=headers, extensions=extensions
            ) as response,
        ):
            return response.status_code

    async def _resolve(self, host: str, port: int) -> IpAddress:
        """An address of a host; all of them must be allowed."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(info[4][0]) for info in found]
        for address in addresses:
            if not (self.allow_private or is_public(address)):
                raise NotDelivered(f"the host {host!r} has the address {address}, not a public one")
        return addresses[0]


def is_public(address: IpAddress) -> bool:
    """Whether an address, or the one that it embeds, is one of the Internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _parse(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidParameter(f"webhook: {text!r:.200} is no URL: {error}") from error
    if url.scheme not in _SCHEMES or not url.host or url.userinfo or len(text) > _MOST_URL:
        raise InvalidParameter(
            f"webhook: {text!r:.200} is not an address such as https://host/path, without a user "
            f"name and of at most {_MOST_URL} characters"
        )
    return url


def build_webhooks(secret: str, hosts: str, *, allow_private: bool) -> Webhooks:
    """The webhooks that the settings allow.

    Args:
        secret: "whsec_" and base64 of at least 24 bytes; empty: there are none.
        hosts: Patterns, comma-separated.
        allow_private: See `Webhooks`.

    Raises:
        StartupError: The secret is not one; the text does not repeat it.
    """
    key = b""
    if secret:
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except (binascii.Error, ValueError) as error:
            raise StartupError("jobs_webhook_secret is not whsec_ and base64") from error
        if len(key) < _SECRET_BYTES:
            raise StartupError(
                f"jobs_webhook_secret has {len(key)} bytes, at least {_SECRET_BYTES} are needed"
            )
    patterns = tuple(host.strip().lower() for host in hosts.split(",") if host.strip())
    return Webhooks(key, patterns, allow_private)
