from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import StartupError
from service.scale.cluster.settings import ClusterSettings

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")


def test_workers_have_reserved_what_the_settings_say() -> None:
    from service.scale.cluster.app import build_workers

    workers = build_workers(ClusterSettings(num_cpus=2, num_gpus=0.5, min_replicas=3))
    assert workers.ray_actor_options == {"num_cpus": 2, "num_gpus": 0.5}
    assert workers.num_replicas == 3
    assert workers.max_ongoing_requests == 32


def test_text_is_read_as_a_flags_and_a_wrong_name_is_refused(tmp_path: Path) -> None:
    """`serve run` gives its arguments as text."""
    from service.scale.cluster.app import build_app

    assert build_app({"model_repo": f"{tmp_path}", "max_replicas": "3"})
    with pytest.raises(StartupError, match="max_replica\n"):
        build_app({"max_replica": "3"})
