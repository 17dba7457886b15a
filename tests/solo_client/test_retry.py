from __future__ import annotations

import pytest

from solo_client.errors import (
    Busy,
    ConnectionFailed,
    RequestRefused,
    ServerFailed,
    SoloError,
    TimedOut,
)
from solo_client.retry import Retry

RETRY = Retry(attempts=5, backoff_s=0.5, max_wait_s=3)


def busy(retry_after_s: float | None, code: str = "overloaded") -> Busy:
    return Busy(503, code, "full", retry_after_s=retry_after_s)


def test_the_window_grows_to_its_bound() -> None:
    failure = ConnectionFailed("no route")
    waits = [RETRY.wait_s(failure, attempt) for attempt in range(1, 6)]
    assert waits == [0.5, 1, 2, 3, None]
    assert Retry(attempts=10_000, max_wait_s=3).wait_s(failure, 9_000) == 3


def test_the_server_is_not_asked_before_it_wants_to() -> None:
    assert RETRY.wait_s(busy(2), 1) == 2.5
    assert RETRY.wait_s(busy(3), 4) == 6
    assert RETRY.wait_s(busy(3.1), 1) is None


def test_the_wait_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    waits = {RETRY.wait_s(busy(2), 2) for _ in range(50)}
    assert len(waits) > 10
    assert all(wait is not None and 2 <= wait < 3 for wait in waits)


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (busy(None, "model_unavailable"), False),
        (busy(None, ""), True),  # a proxy's
        (busy(0), True),
        (RequestRefused(400, "invalid_request", "no"), False),
        (ServerFailed(500, "internal_error", "no"), False),
        (TimedOut("late"), False),
        (ConnectionFailed("gone"), True),
    ],
)
def test_what_is_asked_again(failure: SoloError, again: bool) -> None:
    assert (RETRY.wait_s(failure, 1) is not None) is again
    assert Retry(attempts=1).wait_s(failure, 1) is None


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"backoff_s": -1}, {"max_wait_s": -1}])
def test_wrong_bounds_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Retry(**wrong)
