from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import requirements
from benchmarks.requirements import FILE, find_missing, list_distributions, write_list


def test_the_list_has_what_is_imported_and_what_that_needs() -> None:
    found = list_distributions()
    assert {"numpy", "fastapi", "starlette", "pydantic-core", "pytest-asyncio", "onnx"} <= set(
        found
    )
    assert not {"torch", "triton", "solo-serve", "mypy", "ray", "tensorrt-cu13"} & set(found)
    assert list(found) == sorted(found)


def test_what_is_missing_on_the_machine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"numpy": "2.4.6", "no-such-package": None}
    monkeypatch.setattr(requirements, "list_distributions", lambda: versions)
    assert find_missing(tmp_path) == ["no-such-package"]
    assert write_list(tmp_path).read_text() == "numpy==2.4.6\nno-such-package\n"
    (tmp_path / FILE).write_text("numpy==1.0\nother-package==3\n")
    assert find_missing(tmp_path) == ["other-package"]
