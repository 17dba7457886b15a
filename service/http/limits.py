"""What one connection may take, and how many bytes of bodies all of them may hold."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Protocol

from service.errors import Overloaded, ServiceError
from service.settings import Settings

BODY_BYTES = "body_bytes"
_MUCH_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """The settings of the same names; times in seconds, rates in bytes per second.

    Attributes:
        max_connections: Connections served at once.
        retry_after_s: Of a rejected connection.
        head_timeout_s: From the first byte of a request to the end of its headers; also how long
            a new connection may be silent.
        body_timeout_s: Period in which a body must arrive at `min_rate`.
        body_total_s: From the end of the headers to the end of the body.
        write_timeout_s: Period in which a client must take its response at `min_rate`.
        min_rate: Least rate in both directions.
        keep_alive_s: Between two requests.
    """

    max_connections: int
    retry_after_s: int
    head_timeout_s: float
    body_timeout_s: float
    body_total_s: float
    write_timeout_s: float
    min_rate: float
    keep_alive_s: float

    @classmethod
    def of(cls, settings: Settings) -> ConnectionLimits:
        """Those of the settings."""
        return cls(
            max_connections=settings.max_connections,
            retry_after_s=settings.retry_after_s,
            head_timeout_s=settings.head_timeout_s,
            body_timeout_s=settings.body_timeout_s,
            body_total_s=settings.body_total_s,
            write_timeout_s=settings.write_timeout_s,
            min_rate=settings.min_rate,
            keep_alive_s=settings.keep_alive_s,
        )


class RateWindow:
    """Checks that a transfer moves enough bytes in each period of time.

    Args:
        length_s: The period, seconds.
        rate: Bytes per second; at least one byte per period is required.

    Attributes:
        least: Bytes that must move in a period.
    """

    def __init__(self, length_s: float, rate: float) -> None:
        self.least = max(1, round(rate * length_s))
        self._length_s = length_s
        self._began_s = 0.0
        self._count = 0

    def begin(self, now_s: float, count: int) -> None:
        """Starts a period.

        Args:
            now_s: Monotonic time.
            count: Bytes moved so far.
        """
        self._began_s, self._count = now_s, count

    def is_stalled(self, now_s: float, count: int) -> bool:
        """Whether a period has ended with too few bytes; at its end the next one starts."""
        if now_s - self._began_s < self._length_s:
            return False
        moved = count - self._count
        self.begin(now_s, count)
        return moved < self.least


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
