"""Warnings whose cause may recur thousands of times a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

EVERY_S = 10.0


class RareWarning:
    """Logs one warning at most every `EVERY_S`, with the number of those left out.

    Args:
        logger: Gets the lines.
        clock: Monotonic, seconds.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._next_s: float | None = None
        self._omitted = 0

    def __call__(self, message: str, *values: object) -> None:
        """Logs a message in the style of `logging`, unless another came shortly before."""
        now_s = self._clock()
        if self._next_s is not None and now_s < self._next_s:
            self._omitted += 1
            return
        self._next_s = now_s + EVERY_S
        if self._omitted:
            message, values = f"{message} (and %d times before)", (*values, self._omitted)
        self._omitted = 0
        self._logger.warning(message, *values)
