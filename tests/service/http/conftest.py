from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def quick_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Checks timeouts often; no test may leave an error in the log."""
    monkeypatch.setattr("service.http.connections._CHECK_S", 0.01)
    monkeypatch.setattr("service.http.guard._LINGER_S", 0.2)
    monkeypatch.setattr("service.http.guard._MAX_LINGER_S", 0.6)
    yield
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
