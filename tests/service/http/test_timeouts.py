from __future__ import annotations

import pytest

from service.http.timeouts import RateWindow


@pytest.mark.parametrize(("rate", "least"), [(0, 1), (0.01, 1), (100, 200)])
def test_a_window_asks_for_at_least_one_byte(rate: float, least: int) -> None:
    assert RateWindow(2, rate).least == least


def test_each_window_is_judged_for_itself() -> None:
    window = RateWindow(2, 100)
    window.begin(10, 1000)
    assert not window.is_stalled(11.9, 1000)
    assert not window.is_stalled(12, 1200)
    assert not window.is_stalled(13.9, 1200)
    assert window.is_stalled(14, 1399)
    assert not window.is_stalled(15.9, 1399)
    assert not window.is_stalled(16, 1599)
