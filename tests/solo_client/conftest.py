from __future__ import annotations

from typing import Any

import pytest

INSTANCE: dict[str, Any] = {
    "category_id": 10,
    "category": "red",
    "score": 0.9,
    "bbox": [1, 0, 2, 3],
    "area": 6,
    "segmentation": {"size": [3, 4], "counts": "363"},  # columns 1 and 2 of a 3 x 4 image
}


def answer(*results: dict[str, Any]) -> dict[str, Any]:
    """The body of an answer of POST /segment."""
    return {
        "model": "blobs",
        "version": 2,
        "task": "segmentation",
        "results": list(results),
        "timing_ms": {"total": 1.5},
    }


def found(*instances: dict[str, Any], file_name: str | None = None) -> dict[str, Any]:
    """An image's entry of `results`."""
    return {"file_name": file_name, "width": 4, "height": 3, "instances": list(instances)}


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random waits take all of their window."""
    monkeypatch.setattr("random.random", lambda: 1.0)
