"""A Ray cluster on this machine, of one node or several."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Where everything else runs beside it, processes start slower than Serve expects.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
OBJECT_STORE_BYTES = 200_000_000


def skip_without_ray() -> None:
    """Skips the test where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install '.[ray]'")


@contextmanager
def run_cluster() -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` without nodes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        try:
            yield cluster
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]


def add_node(cluster: Any) -> Any:
    """Starts a node with one CPU, which is room for one worker; the first one is the head.

    Skips the test where Ray's own processes do not start within the 15 s that Ray gives them: no
    setting changes that, and nothing of this project runs yet.
    """
    try:
        return cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
    except Exception as error:
        if "timed out during startup" in str(error):
            pytest.skip(f"this machine is too busy for Ray: {error}")
        raise
