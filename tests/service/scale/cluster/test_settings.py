from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.scale.cluster.settings import ClusterSettings
from service.settings import Settings


def test_engines_follow_what_ray_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ClusterSettings(num_cpus=4, num_gpus=0.5)
    assert (settings.threads, settings.pool_threads, settings.device) == (4, 4, "cuda")
    settings = ClusterSettings(num_cpus=0.5)
    assert (settings.threads, settings.pool_threads, settings.device) == (1, 1, "cpu")
    monkeypatch.setenv("SOLO_NUM_CPUS", "3")
    assert ClusterSettings(threads=2, num_gpus=0).threads == 2
    assert ClusterSettings().pool_threads == 3


@pytest.mark.parametrize(
    ("values", "images"),
    [
        ({}, 2),
        ({"min_replicas": 4}, 8),
        ({"max_replicas": "5", "num_cpus": "3"}, 20),
        ({"max_replicas": 5, "num_cpus": 0.5, "fronts": 3}, 4),
        ({"max_replicas": 5, "jobs_in_flight": 3}, 3),
    ],
)
def test_jobs_keep_all_workers_busy(values: dict[str, Any], images: int) -> None:
    settings = ClusterSettings.model_validate(values)
    assert settings.server_settings()["jobs_in_flight"] == images


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"admin_port": 9000}, "admin_port is not for a cluster"),
        ({"grpc_port": 0}, "grpc_port 0: fronts share a port"),
        ({"model_control": True}, "model_control is not for a cluster"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas 2 is below min_replicas 3"),
        ({"num_gpus": "two"}, "num_gpus"),
        ({"fronts": 0}, "fronts"),
        ({"max_replica": 2}, "max_replica"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ClusterSettings(**values)  # type: ignore[arg-type]


def test_a_process_gets_the_servers_settings(tmp_path: Path) -> None:
    given = ClusterSettings(model_repo=Path("models"), keys_file=tmp_path, max_batch=3, num_cpus=2)
    settings = Settings(**given.server_settings())
    assert (settings.max_batch, settings.threads) == (3, 2)
    assert settings.model_repo == Path.cwd() / "models"
    assert (settings.keys_file, settings.engine_cache) == (tmp_path, None)


@pytest.mark.parametrize(("num_gpus", "gpus"), [("0.5", (0,)), ("1", (0,)), ("2", (0, 1))])
def test_a_worker_uses_the_gpus_that_ray_gives_it(num_gpus: str, gpus: tuple[int, ...]) -> None:
    settings = ClusterSettings.model_validate({"num_gpus": num_gpus})
    assert Settings(**settings.server_settings()).backend_options().gpus == gpus
