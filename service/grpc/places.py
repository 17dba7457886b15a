"""Bounds on what runs at once, with room for every client.

A client may hold at most as many places as are free, as in `service.work.admission`: alone it can
use half of them, and there is always one for another client.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from service.errors import Overloaded


class Places:
    """A number of places; used from one event loop.

    Args:
        total: Places.

    Attributes:
        used: Places that are taken.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._held: Counter[str] = Counter()
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    @contextmanager
    def take(self, client: str) -> Iterator[None]:
        """A place until the context ends.

        Raises:
            Overloaded: There is none for this client.
        """
        if not self._has_room(client):
            raise Overloaded(
                f"{self.used} of {self.total} calls are open, {self._held[client]} of them of this "
                "client, which may have at most as many as are free",
                "connections",
            )
        self._add(client)
        try:
            yield
        finally:
            self._free(client)

    @asynccontextmanager
    async def wait(self, client: str) -> AsyncIterator[None]:
        """A place as soon as there is one for this client, until the context ends."""
        if self._has_room(client):
            self._add(client)
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry = client, turn
            self._waiting.append(entry)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # it has just got its place
                    self._free(client)
                else:
                    self._waiting.remove(entry)
                raise
        try:
            yield
        finally:
            self._free(client)

    def _has_room(self, client: str) -> bool:
        return self._held[client] < self.total - self.used

    def _add(self, client: str) -> None:
        self.used += 1
        self._held[client] += 1

    def _free(self, client: str) -> None:
        self.used -= 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        for entry in tuple(self._waiting):
            waiting, turn = entry
            if not turn.done() and self._has_room(waiting):
                self._waiting.remove(entry)
                self._add(waiting)
                turn.set_result(None)
