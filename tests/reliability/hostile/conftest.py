from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.reliability.hostile.health import HealthWatcher
from tests.reliability.hostile.target import LIMITS, Target, build_flags, find_target
from tests.support.blob_model import publish
from tests.support.server import run_server


@pytest.fixture(scope="module")
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """The target that the test's parameter names."""
    root = tmp_path_factory.mktemp("hostile")
    publish(root / "repo")
    flags = build_flags(request.param, root / "repo")
    with run_server(root / "log", *flags, environment=LIMITS) as server:
        yield find_target(request.param, server)


@pytest.fixture(scope="module")
def watcher(target: Target) -> Iterator[HealthWatcher]:
    """Of the attacked port."""
    with HealthWatcher(target.port) as watcher:
        yield watcher
