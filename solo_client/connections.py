"""Pools of connections of a client: one for each process and each event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import httpx

from solo_client.address import find_proxy, load_certificates, parse_address
from solo_client.answer import AnswerParser, translate
from solo_client.errors import SoloError
from solo_client.retry import Retry

FAILURES = (httpx.RequestError, SoloError)
_Http = TypeVar("_Http", httpx.Client, httpx.AsyncClient)
_Slots = TypeVar("_Slots", threading.Semaphore, asyncio.Semaphore)
_Transport = TypeVar("_Transport", httpx.BaseTransport, httpx.AsyncBaseTransport)
CALLS = 100
"""Calls at once of a pool, each with a connection. Others wait before they read their images:
httpx's own queue takes time that grows with the square of its length."""


@dataclass(frozen=True)
class ConnectionPool(Generic[_Http, _Slots]):
    """The connections of a process and an event loop.

    Attributes:
        http: Sends requests.
        slots: Held by each call.
    """

    http: _Http
    slots: _Slots


class Connections(Generic[_Http, _Slots, _Transport]):
    """Settings of a client, its pools of connections and its decision to retry.

    A connection belongs to the process and the event loop that opened it: another process would
    read its answers, another loop cannot wait for it. Each has a pool of its own.
    """

    _http_class: ClassVar[Any]
    _slots_class: ClassVar[Any]

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float | None = 60.0,
        retry: Retry | None = None,
        transport: _Transport | None = None,
    ) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}, not a positive number or None")
        address = parse_address(url)
        headers = {"user-agent": "solo-client"}
        if api_key is not None:
            headers["x-api-key"] = _check_key(api_key)
        self._arguments: dict[str, Any] = {
            "url": url,
            "api_key": api_key,
            "timeout_s": timeout_s,
            "retry": retry,
        }
        self._timeout_s = timeout_s
        self._retry = retry or Retry()
        self._options: dict[str, Any] = {
            "headers": headers,
            "timeout": httpx.Timeout(timeout_s, pool=None),
            "trust_env": False,
            "limits": httpx.Limits(max_connections=CALLS, keepalive_expiry=5),
            "transport": transport,
        }
        if address.userinfo:
            self._options["auth"] = (address.username, address.password)
            address = address.copy_with(username=None, password=None)
        self._options["base_url"] = address
        self.url = self._route = str(address)
        if transport is None:
            proxy = find_proxy(address)
            self._options |= {"proxy": proxy, "verify": load_certificates(address, proxy)}
            if proxy is not None:
                self._route += f" through the proxy {proxy.url}"
        self._transport_is_used = False
        self._closed = False
        self._forget()
        _connections.add(self)

    def _forget(self) -> None:
        """Drops the pools without a word to the server: after a fork they are the parent's too."""
        self._lock = threading.Lock()
        self._pools: dict[object, ConnectionPool[_Http, _Slots]] = {}

    def _open(self, owner: object = None) -> ConnectionPool[_Http, _Slots]:
        """The pool of this process and of an event loop.

        Raises:
            RuntimeError: The client is closed, or its transport is another loop's or process's.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed; a closed client cannot be used again")
            if owner not in self._pools:
                self._pools[owner] = self._build()
            return self._pools[owner]

    def _build(self) -> ConnectionPool[_Http, _Slots]:
        if self._transport_is_used:
            raise RuntimeError(
                "the client's transport belongs to the process and event loop that used it first; "
                "create another client here"
            )
        self._transport_is_used = self._options["transport"] is not None
        return ConnectionPool(self._http_class(**self._options), self._slots_class(CALLS))

    def _end(self) -> dict[object, ConnectionPool[_Http, _Slots]]:
        """Closes the client for further calls; returns its pools."""
        with self._lock:
            self._closed = True
            pools, self._pools = self._pools, {}
        return pools

    def _wait_s(
        self, error: httpx.RequestError | SoloError, answer: AnswerParser | None, attempt: int
    ) -> float:
        """Seconds until the next attempt; raises the error if there is none."""
        if answer is not None and answer.raised_by_callback is error:
            raise error
        failure = translate(error, self._route, self._timeout_s)
        wait_s = self._retry.wait_s(failure, attempt)
        if wait_s is None:
            raise failure
        return wait_s

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has the settings, also the API key, and connections of its own."""
        if self._options["transport"] is not None:
            raise TypeError(
                "a client with a transport of its own can be neither copied nor pickled"
            )
        return partial(type(self), **self._arguments), ()


_connections: weakref.WeakSet[Connections[Any, Any, Any]] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for connections in list(_connections):
        connections._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def _check_key(key: str) -> str:
    if not (key and key.isascii() and key.isprintable()):
        raise ValueError("the API key is empty or has characters that are not printable ASCII")
    return key
