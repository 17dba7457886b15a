"""One call at a time of an expensive function, for all who ask for its result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedCalls(Generic[T]):
    """Calls one after the other; whoever asks before a call has begun shares its result."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._waiting: dict[str, asyncio.Task[T]] = {}

    async def get(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """The result of a call of `work` that begins after this.

        Args:
            key: Callers with the same key share calls.
            work: The function.
        """
        if key not in self._waiting:
            self._waiting[key] = asyncio.ensure_future(self._call(key, work))
        # A caller that is cancelled does not end the call for the others.
        return await asyncio.shield(self._waiting[key])

    async def _call(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        async with self._turn:
            del self._waiting[key]
            return await work()
