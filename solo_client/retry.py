"""When a request is sent again."""

from __future__ import annotations

import email.utils
import random
import re
import time
from dataclasses import dataclass
from datetime import UTC

from solo_client.errors import Busy, ConnectionFailed, SoloError


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Retries while the server is busy or the connection fails (segmenting is idempotent).

    The wait before attempt n + 1 is the server's Retry-After plus a random part of
    `backoff_s * 2 ** (n - 1)`, which spreads the retries of clients that were refused together.

    Attributes:
        attempts: Highest number of attempts; 1 disables retries.
        backoff_s: Upper bound of the first random wait.
        max_wait_s: Upper bound of every random wait; a longer Retry-After ends the retries.
    """

    attempts: int = 5
    backoff_s: float = 0.5
    max_wait_s: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff_s < 0 or self.max_wait_s < 0:
            raise ValueError(f"{self}: attempts must be positive, times must not be negative")

    def wait_s(self, failure: SoloError, attempt: int) -> float | None:
        """Seconds to wait before the next attempt; None if there is none.

        Args:
            failure: The error of this attempt.
            attempt: Number of this attempt, from 1.
        """
        asked_s = 0.0
        if isinstance(failure, Busy):
            if failure.code and failure.retry_after_s is None:
                return None  # solo-serve sends Retry-After whenever a retry can succeed
            asked_s = failure.retry_after_s or 0.0
        elif not isinstance(failure, ConnectionFailed):
            return None
        if attempt >= self.attempts or not 0 <= asked_s <= self.max_wait_s:
            return None
        window_s = min(self.backoff_s * 2.0 ** min(attempt - 1, 32), self.max_wait_s)
        return asked_s + random.random() * window_s


def read_retry_after(value: str | None) -> float | None:
    """Seconds from now, from a Retry-After header: seconds or a date; None if it is neither."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        known = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        return max(0.0, known.timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
