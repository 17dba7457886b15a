"""The clients: `Client` for threads, `AsyncClient` for an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar, Unpack

import httpx

from solo_client.answer import (
    AnswerParser,
    OnProgress,
    blame_image,
    read_models,
    read_results,
    translate,
)
from solo_client.errors import ImageFailed, ServerError, SoloError
from solo_client.images import ImageInput
from solo_client.request import Options, build_request
from solo_client.result import Result
from solo_client.retry import Retry

_READY: dict[str, Any] = {"method": "GET", "url": "/v2/health/ready"}
_MODELS: dict[str, Any] = {"method": "GET", "url": "/v2/models"}
_FAILURES = (httpx.RequestError, SoloError)
_Http = TypeVar("_Http", httpx.Client, httpx.AsyncClient)
_Transport = TypeVar("_Transport", httpx.BaseTransport, httpx.AsyncBaseTransport)


class _Connections(Generic[_Http, _Transport]):
    """Settings of a client, its pool of connections and its decision to retry."""

    _http_class: ClassVar[Any]

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retry: Retry | None = None,
        transport: _Transport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a server's address starts with http:// or https://, not {url!r}")
        headers = {"user-agent": "solo-client"}
        if api_key is not None:
            headers["x-api-key"] = api_key
        self.url = url
        self._retry = retry or Retry()
        self._http: _Http = self._http_class(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, pool=None),
            transport=transport,
        )

    def _wait_s(self, error: httpx.RequestError | SoloError, attempt: int) -> float:
        """Seconds until the next attempt; raises the error if there is none."""
        failure = translate(error, self.url)
        wait_s = self._retry.wait_s(failure, attempt)
        if wait_s is None:
            raise failure
        return wait_s


class Client(_Connections[httpx.Client, httpx.BaseTransport]):
    """A client that several threads may use; `with` or `close` closes its connections.

    Args:
        url: Address of the server, e.g. http://localhost:8000.
        api_key: Sent as X-API-Key.
        timeout_s: Bounds connecting, and each wait for the server to send something. While it
            works on a request it sends its progress at least every 5 s, so a large image does not
            time out; an older server sends nothing before the result. The wait for a free
            connection of this client is not bounded.
        retry: When a request is sent again.
        transport: Transport of httpx, for tests and special networks.
    """

    _http_class = httpx.Client

    def segment(
        self,
        image: ImageInput,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Segments one image.

        Args:
            image: A path, the bytes of a file, a PIL image or an array (`ImageInput`).
            on_progress: Called when the request is admitted, when canvases are finished, and
                at least every 5 s. A retry starts again at 0. An exception from it ends the
                request. An older server reports nothing.
            **options: Fields of `Options`.

        Raises:
            ImageFailed: The server cannot segment the image.
            SoloError: Any other failure (`solo_client.errors`).
            OSError, TypeError, ValueError: The image cannot be sent.
        """
        return _only(self.segment_many([image], on_progress=on_progress, **options))

    def segment_many(
        self,
        images: Sequence[ImageInput],
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> list[Result | ImageFailed]:
        """Segments several images in one request; their canvases are counted together.

        Returns:
            For each image, in their order, its result or its error.

        Raises:
            SoloError: The whole request failed.
            OSError, TypeError, ValueError: An image cannot be sent.
        """
        if not images:
            return []
        request = build_request(images, options)
        try:
            return read_results(self._ask(request, on_progress), images, self.url)
        except ServerError as error:
            return blame_image(error, images)

    def list_models(self) -> list[dict[str, Any]]:
        """Name, state and version of every model of the server."""
        return read_models(self._ask(_MODELS), self.url)

    def is_ready(self) -> bool:
        """Whether the server accepts work; False if it cannot be reached. Does not retry."""
        try:
            return self._http.request(**_READY).is_success
        except httpx.RequestError:
            return False

    def _ask(self, request: dict[str, Any], on_progress: OnProgress | None = None) -> Any:
        attempt = 0
        while True:
            attempt += 1
            try:
                with self._http.stream(**request) as response:
                    answer = AnswerParser(response, on_progress)
                    for chunk in response.iter_bytes():
                        answer.feed(chunk)
                return answer.finish()
            except _FAILURES as error:
                wait_s = self._wait_s(error, attempt)
            time.sleep(wait_s)

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


class AsyncClient(_Connections[httpx.AsyncClient, httpx.AsyncBaseTransport]):
    """The methods of `Client` as coroutines, for one event loop; closed by `async with` or `close`.

    Cancelling a call closes its connection; the server then drops the work. Files are read and
    arrays are encoded in a thread.
    """

    _http_class = httpx.AsyncClient

    async def segment(
        self,
        image: ImageInput,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Segments one image; `on_progress` is called in the event loop and must not block."""
        return _only(await self.segment_many([image], on_progress=on_progress, **options))

    async def segment_many(
        self,
        images: Sequence[ImageInput],
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> list[Result | ImageFailed]:
        """Segments several images in one request; a result or an error for each of them."""
        if not images:
            return []
        request = await asyncio.to_thread(build_request, images, options)
        try:
            return read_results(await self._ask(request, on_progress), images, self.url)
        except ServerError as error:
            return blame_image(error, images)

    async def list_models(self) -> list[dict[str, Any]]:
        """Name, state and version of every model of the server."""
        return read_models(await self._ask(_MODELS), self.url)

    async def is_ready(self) -> bool:
        """Whether the server accepts work; False if it cannot be reached. Does not retry."""
        try:
            return (await self._http.request(**_READY)).is_success
        except httpx.RequestError:
            return False

    async def _ask(self, request: dict[str, Any], on_progress: OnProgress | None = None) -> Any:
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._http.stream(**request) as response:
                    answer = AnswerParser(response, on_progress)
                    async for chunk in response.aiter_bytes():
                        answer.feed(chunk)
                return answer.finish()
            except _FAILURES as error:
                wait_s = self._wait_s(error, attempt)
            await asyncio.sleep(wait_s)

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


def _only(results: list[Result | ImageFailed]) -> Result:
    (result,) = results
    if isinstance(result, ImageFailed):
        raise result
    return result
