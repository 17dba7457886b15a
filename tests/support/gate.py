"""An engine whose calls wait until the test lets them through."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from service.models.repository import Repository

WAIT_S = 20.0


class EngineGate:
    """Holds the calls of one model's engine.

    Args:
        monkeypatch: Of the test.
        repository: Loaded; the model's only version is changed.
        name: The model's.

    Attributes:
        calls: Calls that were let through.
        is_waiting: Whether a call waits to be let through.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, repository: Repository, name: str = "blobs"
    ) -> None:
        (loaded,) = repository.models[name].values()
        self.calls = 0
        self.is_waiting = False
        self._permits = threading.Semaphore(0)
        self._infer = loaded.backend.infer
        monkeypatch.setattr(loaded.backend, "infer", self._infer_when_let)

    def _infer_when_let(self, tiles: Any) -> Any:
        self.is_waiting = True
        assert self._permits.acquire(timeout=WAIT_S), "the test has let no call through"
        self.is_waiting = False
        self.calls += 1
        return self._infer(tiles)

    def let(self, calls: int = 1_000_000) -> None:
        """Lets further calls through; by default all."""
        self._permits.release(calls)
