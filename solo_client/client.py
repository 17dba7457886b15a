"""The clients: `Client` for threads, `AsyncClient` for an event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from solo_client.errors import ImageFailed, ServerError, SoloError
from solo_client.images import ImageInput
from solo_client.messages import (
    Options,
    blame_image,
    build_request,
    read_failure,
    read_models,
    read_results,
    translate,
)
from solo_client.result import Result
from solo_client.retry import Retry

_READY: dict[str, Any] = {"method": "GET", "url": "/v2/health/ready"}
_MODELS: dict[str, Any] = {"method": "GET", "url": "/v2/models"}


def _configure(url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Arguments of httpx' clients."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"a server's address starts with http:// or https://, not {url!r}")
    headers = {"user-agent": "solo-client"}
    if api_key is not None:
        headers["x-api-key"] = api_key
    return {"base_url": url, "headers": headers, "timeout": timeout_s}


def _only(results: list[Result | ImageFailed]) -> Result:
    (result,) = results
    if isinstance(result, ImageFailed):
        raise result
    return result


class Client:
    """Talks to a server; may be used by several threads, and is closed by `with` or `close`.

    Args:
        url: The server's address, e.g. http://localhost:8000.
        api_key: Sent as X-API-Key.
        timeout_s: For connecting, and for each wait for the server.
        retry: When to ask again.
        transport: Of httpx; for tests and special networks.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retry: Retry | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url
        self._retry = retry or Retry()
        self._http = httpx.Client(**_configure(url, api_key, timeout_s), transport=transport)

    def segment(self, image: ImageInput, **options: Unpack[Options]) -> Result:
        """Segments one image.

        Args:
            image: A path, a file's bytes, a PIL image or an array (`ImageInput`).
            **options: See `Options`.

        Raises:
            ImageFailed: The server cannot segment it.
            SoloError: Any other reason; see `solo_client.errors`.
            OSError, TypeError, ValueError: The image cannot be sent.
        """
        return _only(self.segment_many([image], **options))

    def segment_many(
        self, images: Sequence[ImageInput], **options: Unpack[Options]
    ) -> list[Result | ImageFailed]:
        """Segments several images in one request.

        Returns:
            A result for each image, in their order; for one that failed, why.

        Raises:
            SoloError: The request failed, and with it all of them.
            OSError, TypeError, ValueError: An image cannot be sent.
        """
        if not images:
            return []
        request = build_request(images, options)
        try:
            return read_results(self._ask(request), images)
        except ServerError as error:
            return blame_image(error, images)

    def list_models(self) -> list[dict[str, Any]]:
        """Name, state and version of every model of the server."""
        return read_models(self._ask(_MODELS))

    def is_ready(self) -> bool:
        """Whether the server can be reached and takes work; never waits to ask again."""
        try:
            return self._http.request(**_READY).is_success
        except httpx.RequestError:
            return False

    def _ask(self, request: dict[str, Any]) -> httpx.Response:
        for attempt in itertools.count(1):
            try:
                response = self._http.request(**request)
                if response.is_success:
                    return response
                failure: SoloError = read_failure(response)
            except httpx.RequestError as error:
                failure = translate(error, self.url)
            wait_s = self._retry.wait_s(failure, attempt)
            if wait_s is None:
                raise failure
            time.sleep(wait_s)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient:
    """As `Client`, for one event loop; closed by `async with` or `close`.

    A cancelled call closes its connection, and the server removes what still waits there.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retry: Retry | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url
        self._retry = retry or Retry()
        self._http = httpx.AsyncClient(**_configure(url, api_key, timeout_s), transport=transport)

    async def segment(self, image: ImageInput, **options: Unpack[Options]) -> Result:
        """See `Client.segment`."""
        return _only(await self.segment_many([image], **options))

    async def segment_many(
        self, images: Sequence[ImageInput], **options: Unpack[Options]
    ) -> list[Result | ImageFailed]:
        """See `Client.segment_many`."""
        if not images:
            return []
        request = await asyncio.to_thread(build_request, images, options)
        try:
            return read_results(await self._ask(request), images)
        except ServerError as error:
            return blame_image(error, images)

    async def list_models(self) -> list[dict[str, Any]]:
        """See `Client.list_models`."""
        return read_models(await self._ask(_MODELS))

    async def is_ready(self) -> bool:
        """See `Client.is_ready`."""
        try:
            return (await self._http.request(**_READY)).is_success
        except httpx.RequestError:
            return False

    async def _ask(self, request: dict[str, Any]) -> httpx.Response:
        for attempt in itertools.count(1):
            try:
                response = await self._http.request(**request)
                if response.is_success:
                    return response
                failure: SoloError = read_failure(response)
            except httpx.RequestError as error:
                failure = translate(error, self.url)
            wait_s = self._retry.wait_s(failure, attempt)
            if wait_s is None:
                raise failure
            await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
