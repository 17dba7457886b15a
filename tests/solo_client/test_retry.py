from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from solo_client.errors import (
    Busy,
    ConnectionFailed,
    RequestRefused,
    ServerFailed,
    SoloError,
    TimedOut,
)
from solo_client.retry import Retry, read_retry_after

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
    for absurd_s in (3.1, float("inf"), float("nan"), -1.0):
        assert RETRY.wait_s(busy(absurd_s), 1) is None


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
        (Busy(502, "", "a proxy's page", retry_after_s=None), True),
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


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        (None, None),
        ("", None),
        ("soon", None),
        ("-3", None),
        ("nan", None),
        ("inf", None),
        ("٣", None),
        ("Wed, 99 Jan 2030 00:00:00 GMT", None),
        ("Wed, 01 Jan 2020 00:00:00 -0000", 0.0),
        pytest.param(
            format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True),
            0.0,
            id="an hour ago",  # the same in every process that shares the tests
        ),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, expected: float | None) -> None:
    assert read_retry_after(value) == expected


@pytest.mark.parametrize("zone", ["GMT", "+0000", "-0000"])
def test_retry_after_may_be_a_date_to_come(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: datetime(2030, 1, 1, tzinfo=UTC).timestamp())
    assert read_retry_after(f"Tue, 01 Jan 2030 00:00:20 {zone}") == 20


@given(st.text(alphabet="0123456789 :,+-.eJanTueMGT", max_size=40))
@example("9" * 5000)
@example("Mon, 01 Jan 0001 00:00:00 +2359")
@example("Mon, 01 Jan 0001 00:00:00 -0000")
@example("Fri, 31 Dec 9999 23:59:59 -2359")
@example("Fri, 31 Dec 9999 23:59:59 +9999")
@example("Fri, 31 Dec 99999999999999999999 23:59:59 GMT")
def test_no_header_breaks_the_client(value: str) -> None:
    wanted = read_retry_after(value)
    assert wanted is None or wanted >= 0
