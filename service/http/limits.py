"""How many bytes of bodies all connections together may hold."""

from __future__ import annotations

import ctypes
import sys
from typing import Protocol

from service.errors import Overloaded, ServiceError

BODY_BYTES = "body_bytes"
_MUCH_BYTES = 32 * 1024 * 1024


class BodySource(Protocol):
    """A connection that receives a body."""

    @property
    def arriving_bytes(self) -> int:
        """Bytes held of the body that is not complete."""

    def refuse_body(self, error: ServiceError) -> None:
        """Answers the request with the error, and drops and releases its body."""


class RequestBodies:
    """Counts the bytes of all request bodies in memory, from their arrival to the response.

    Beyond the limit the largest body that is still arriving is refused, so that small requests
    are served while large ones fill the memory.

    Args:
        max_bytes: The limit.

    Attributes:
        held: Bytes in memory.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0
        self._most_held = 0
        self._arriving: set[BodySource] = set()

    def add(self, source: BodySource, count: int) -> None:
        """Counts bytes that `source` has received and already includes in `arriving_bytes`."""
        self.held += count
        self._most_held = max(self._most_held, self.held)
        self._arriving.add(source)
        while self.held > self.max_bytes and self._arriving:
            largest = max(self._arriving, key=lambda other: other.arriving_bytes)
            self._arriving.discard(largest)
            largest.refuse_body(
                Overloaded(
                    f"{self.held} bytes of request bodies are in memory, the limit is "
                    f"{self.max_bytes}; this is the largest one that is not complete",
                    BODY_BYTES,
                )
            )

    def complete(self, source: BodySource) -> None:
        """The body of `source` has been received; its bytes stay counted."""
        self._arriving.discard(source)

    def release(self, count: int) -> None:
        """Bytes are not held any more."""
        self.held -= count

    def has_shrunk(self) -> bool:
        """Whether much memory was released since this was last true."""
        if self._most_held - self.held < _MUCH_BYTES:
            return False
        self._most_held = self.held
        return True


def return_free_memory() -> None:
    """Has the C library give freed memory back to the system; glibc alone keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
