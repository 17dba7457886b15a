from __future__ import annotations

import warnings
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


@pytest.mark.parametrize(("delay_s", "look_back_s"), [(0, 12), (10, 12), (20, 20), (600, 30)])
def test_the_load_is_averaged_over_more_than_one_report(delay_s: float, look_back_s: float) -> None:
    from service.scale.cluster.app import build_workers

    settings = ClusterSettings(max_replicas=2, upscale_delay_s=delay_s)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Ray will refuse a time that is not longer than its period
        scaling = build_workers(settings)._deployment_config.autoscaling_config
    assert scaling is not None
    assert scaling.look_back_period_s == look_back_s


def test_fronts_that_share_a_folder_are_on_one_node(tmp_path: Path) -> None:
    from service.scale.cluster.app import FRONT, build_app

    for jobs_dir, resources in ((None, None), (f"{tmp_path}", {"node:__internal_head__": 0.001})):
        app = build_app({"model_repo": f"{tmp_path}", "fronts": 2, "jobs_dir": jobs_dir})
        front = app._bound_deployment
        assert (front.name, front.num_replicas) == (FRONT, 2)
        assert (front.ray_actor_options or {}).get("resources") == resources


def test_a_wrong_setting_of_jobs_is_refused_before_anything_is_deployed(tmp_path: Path) -> None:
    from service.scale.cluster.app import build_app

    with pytest.raises(StartupError, match="data"):
        build_app({"jobs_dir": f"{tmp_path}", "jobs_roots": "data"})


def test_text_is_read_as_a_flags_and_a_wrong_name_is_refused(tmp_path: Path) -> None:
    """`serve run` gives its arguments as text."""
    from service.scale.cluster.app import build_app

    assert build_app({"model_repo": f"{tmp_path}", "max_replicas": "3"})
    with pytest.raises(StartupError, match="max_replica\n"):
        build_app({"max_replica": "3"})
