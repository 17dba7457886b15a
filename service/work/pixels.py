"""The bound on decoded images in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

LARGE_SHARE = 16
"""An image is large if it has more than this part of the budget's pixels."""


class PixelBudget:
    """Counts the pixels of decoded images; thread-safe.

    Half of the budget is for large images, half for the others, so that neither keeps the other
    kind waiting. One image of each kind is always allowed. Of each half, a client that holds an
    image may hold at most as many pixels as are free then: there is room for other clients.

    Args:
        max_pixels: The budget; a decoded pixel takes 3 bytes.
    """

    def __init__(self, max_pixels: int = 200_000_000) -> None:
        self.max_pixels = max_pixels
        self.generation = 0
        """Grows with every release."""
        self._held: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def held(self) -> int:
        """Pixels of decoded images in memory."""
        with self._lock:
            return sum(held.total() for held in self._held.values())

    def take(self, pixels: int, client: str) -> bool:
        """Reserves the pixels of a client's image; False if it has to wait for `release`."""
        held = self._held[self._is_large(pixels)]
        with self._lock:
            free = self.max_pixels // 2 - held.total() - pixels
            own = held[client]
            if held and (free < 0 or (own and own + pixels > free)):
                return False
            held[client] += pixels
            return True

    def release(self, pixels: int, client: str) -> None:
        """Gives the pixels of a client's image back and calls the callbacks."""
        held = self._held[self._is_large(pixels)]
        with self._lock:
            held[client] -= pixels
            if not held[client]:
                del held[client]
            self.generation += 1
        for callback in tuple(self._callbacks):
            callback()

    def on_release(self, callback: Callable[[], None]) -> None:
        """Calls a function after every release, in the releasing thread."""
        self._callbacks.append(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        """Undoes `on_release`."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def _is_large(self, pixels: int) -> bool:
        return pixels * LARGE_SHARE > self.max_pixels
