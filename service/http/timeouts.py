"""How long a connection may take, and how slowly it may send and receive."""

from __future__ import annotations

from service.errors import BodyTimeout
from service.http.transport import GuardedTransport
from service.settings import Settings


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


class BodyTimer:
    """The time and the rate of one body after another.

    Args:
        settings: `body_total_s`, `body_timeout_s` and `min_rate`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._window = RateWindow(settings.body_timeout_s, settings.min_rate)
        self._began_s = 0.0

    def begin(self, now_s: float) -> None:
        """The headers are complete."""
        self._began_s = now_s
        self._window.begin(now_s, 0)

    def check(self, now_s: float, received: int, *, is_paused: bool) -> BodyTimeout | None:
        """The error of a body that is too slow.

        Args:
            now_s: Monotonic time.
            received: Bytes of the body.
            is_paused: The application has not taken what is here.
        """
        total_s, period_s = self._settings.body_total_s, self._settings.body_timeout_s
        if is_paused:
            self._window.begin(now_s, received)
            return None
        if now_s - self._began_s > total_s:
            text = f"the body was not complete after {total_s:g} s"
        elif self._window.is_stalled(now_s, received):
            text = f"fewer than {self._window.least} bytes of the body came in {period_s:g} s"
        else:
            return None
        return BodyTimeout(f"{text}; {received} bytes were here")


class ResponseTimer:
    """The rate at which a client takes what is written for it.

    Args:
        settings: `write_timeout_s` and `min_rate`.
    """

    def __init__(self, settings: Settings) -> None:
        self._window = RateWindow(settings.write_timeout_s, settings.min_rate)
        self._is_writing = False

    def is_stalled(self, now_s: float, transport: GuardedTransport) -> bool:
        """Whether the client takes too little; to be asked several times a period."""
        if not transport.get_write_buffer_size():
            self._is_writing = False
            return False
        if not self._is_writing:
            self._is_writing = True
            self._window.begin(now_s, transport.taken)
        return self._window.is_stalled(now_s, transport.taken)
