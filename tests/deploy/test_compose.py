"""docker-compose.yml as data: what it starts, in which order, with which rights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("server", "server-gpu")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return loaded


def test_what_is_started(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"server", "server-gpu", "prometheus", "grafana"}
    assert {name for name, service in services.items() if "profiles" in service} == {"server-gpu"}
    assert services["server-gpu"]["profiles"] == ["gpu"]


@pytest.mark.parametrize("name", ["server", "server-gpu", "prometheus", "grafana"])
def test_each_service_has_a_health_check(compose: dict[str, Any], name: str) -> None:
    check = compose["services"][name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries", "start_period"} <= set(check)


def test_each_waits_for_the_health_of_the_one_before(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["prometheus"]["depends_on"] == {"server": {"condition": "service_healthy"}}
    assert services["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_has_few_rights(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert "./model_repo:/models:ro" in service["volumes"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service.get("privileges")


def test_the_gpu_is_asked_for_by_the_gpu_server_alone(compose: dict[str, Any]) -> None:
    asks = {name for name, service in compose["services"].items() if "deploy" in service}
    assert asks == {"server-gpu"}
    (device,) = compose["services"]["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]


def test_engines_that_were_built_outlive_the_container(compose: dict[str, Any]) -> None:
    from tests.deploy.test_dockerfiles import last_stage

    assert "engine-cache:/cache" in compose["services"]["server-gpu"]["volumes"]
    assert ("VOLUME", "/cache") in last_stage("docker/Dockerfile.gpu")


def test_building_an_engine_is_no_ill_health(compose: dict[str, Any]) -> None:
    from tests.deploy.test_dockerfiles import last_stage

    period = compose["services"]["server-gpu"]["healthcheck"]["start_period"]
    assert int(period.removesuffix("s")) >= 600
    (check,) = [rest for word, rest in last_stage("docker/Dockerfile.gpu") if word == "HEALTHCHECK"]
    assert f"--start-period={period}" in check


def test_variables_of_the_servers_are_settings(compose: dict[str, Any]) -> None:
    from service.settings import Settings

    for name in SERVERS:
        for variable in compose["services"][name].get("environment", {}):
            assert variable.removeprefix("SOLO_").lower() in Settings.model_fields


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+(-gpu)?$", service["image"]), (name, service["image"])


def test_two_servers_do_not_want_one_port(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert len(ports) == len(set(ports)) == 4


def test_every_file_that_is_mounted_or_built_exists(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        sources = [volume.split(":")[0] for volume in service["volumes"]]
        if "build" in service:
            sources.append("./" + service["build"]["dockerfile"])
        for source in sources:
            if source.startswith("."):
                assert (ROOT / source).exists(), source
            else:
                assert source in compose["volumes"]


def test_prometheus_scrapes_the_services_by_name(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "solo-serve"  # the rules and the dashboard select it by this name
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert job["dns_sd_configs"][0]["names"] == ["server-gpu"]
    assert set(SERVERS) <= set(compose["services"])


def test_the_server_outlives_its_own_draining(compose: dict[str, Any]) -> None:
    from service.settings import Settings

    grace_s = int(compose["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > Settings.model_fields["drain_timeout_s"].default
