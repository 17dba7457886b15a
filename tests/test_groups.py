"""Which tests stay together where several processes share them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TOGETHER, group_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("file", TOGETHER)
def test_the_named_files_exist(file: str) -> None:
    assert (ROOT / file).is_file()


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/test_imports.py::test_a[ray]", "tests/test_imports.py"),
        ("tests/service/test_keys.py::TestA::test_b", "tests/service/test_keys.py"),
        (
            "tests/service/http/routes/test_health.py::test_a[single]",
            "tests/service/http/routes/test_health.py",
        ),
        ("tests/service/http/routes/test_health.py::test_a[ray-0]", "ray"),
        ("tests/service/predict/test_ray_job.py::test_a", "ray"),
        ("tests/export/test_exits.py::test_a[model.onnx]", "tiny_graph"),
    ],
)
def test_a_file_stays_together_and_so_does_ray(nodeid: str, group: str) -> None:
    assert group_of(nodeid) == group
