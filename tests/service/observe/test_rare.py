from __future__ import annotations

import logging

import pytest

from service.observe.rare import EVERY_S, RareWarning


def test_a_flood_is_two_lines_and_their_number(caplog: pytest.LogCaptureFixture) -> None:
    now_s = [5.0]
    warn = RareWarning(logging.getLogger("service.test"), lambda: now_s[0])
    for index in range(100):
        warn("connection %d is refused", index)
    now_s[0] += EVERY_S
    warn("connection %d is refused", 100)
    warn("not shown")
    now_s[0] += EVERY_S + 1
    warn("later")
    now_s[0] += EVERY_S + 1
    warn("alone")
    assert [record.getMessage() for record in caplog.records] == [
        "connection 0 is refused",
        "connection 100 is refused (and 99 times before)",
        "later (and 1 times before)",
        "alone",
    ]
