"""When to ask again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from solo_client.errors import Busy, ConnectionFailed, SoloError


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Asks again while the server is busy or the connection fails; segmenting twice does no harm.

    Before attempt n + 1 it waits as long as the server asked for (Retry-After), and then a random
    part of `backoff_s * 2 ** (n - 1)`, so that clients that were turned away together do not come
    back together.

    Attributes:
        attempts: How often one request is sent at most; 1 never asks again.
        backoff_s: The first random wait is at most this long.
        max_wait_s: No random wait is longer; a server that wants a longer one is not asked again.
    """

    attempts: int = 5
    backoff_s: float = 0.5
    max_wait_s: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff_s < 0 or self.max_wait_s < 0:
            raise ValueError(f"{self}: attempts must be positive, times not negative")

    def wait_s(self, failure: SoloError, attempt: int) -> float | None:
        """How long to wait after a failure; None: give up.

        Args:
            failure: What happened.
            attempt: Which attempt it was, from 1.
        """
        asked_s = 0.0
        if isinstance(failure, Busy):
            if failure.code and failure.retry_after_s is None:
                return None  # solo-serve says with Retry-After that it will be better
            asked_s = failure.retry_after_s or 0.0
        elif not isinstance(failure, ConnectionFailed):
            return None
        if attempt >= self.attempts or asked_s > self.max_wait_s:
            return None
        window_s = min(self.backoff_s * 2.0 ** min(attempt - 1, 32), self.max_wait_s)
        return asked_s + random.random() * window_s
