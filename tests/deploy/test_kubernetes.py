"""docker/kubernetes: valid for Kubernetes' own schemas, and in step with the server. No cluster."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.observe.metrics import Metrics
from service.settings import Settings
from tests.deploy import manifests as m
from tests.deploy.kubernetes_checks import CHECKS, build_settings
from tests.deploy.queries import metric_names
from tests.support.metrics import render

pytestmark = pytest.mark.skipif(
    m.find_kubectl() is None, reason="kubectl, which has kustomize, is not installed"
)
OLDEST = "1.30"
PAGE = (m.ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"}
# The operator's CRD is in no schema package; these are its documented fields that are used here.
SERVICE_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["selector", "endpoints"],
            "properties": {
                "jobLabel": {"type": "string"},
                "selector": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["matchLabels"],
                    "properties": {"matchLabels": {"additionalProperties": {"type": "string"}}},
                },
                "endpoints": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["port"],
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string", "pattern": "^/"},
                            "interval": DURATION,
                            "scrapeTimeout": DURATION,
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kustomization")


@pytest.fixture(params=m.BUILDS)
def manifests(
    request: pytest.FixtureRequest, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> list[m.Manifest]:
    """A build, seen with the variables that its image has and none of this machine."""
    built = m.build(request.param, scratch)
    for name in [*filter(lambda name: name.startswith("SOLO_"), os.environ), "XDG_CACHE_HOME"]:
        monkeypatch.delenv(name, raising=False)
    cache = m.image_environment(built).get("XDG_CACHE_HOME")
    if cache is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    keys_file = m.environment(built).get("SOLO_KEYS_FILE")
    if keys_file is not None:  # the application reads it
        monkeypatch.setattr("service.http.app.KeyRing", lambda file: f"keys of {file}")
    return built


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_kubernetes_schemas(manifests: list[m.Manifest], version: str) -> None:
    for manifest in manifests:
        if manifest["kind"] == "ServiceMonitor":
            jsonschema.validate(manifest, SERVICE_MONITOR)
        else:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: str(check.__name__))
def test_in_step_with_the_server(
    manifests: list[m.Manifest], check: Callable[[list[m.Manifest]], Iterator[str]]
) -> None:
    assert list(check(manifests)) == []


def _set(manifests: list[m.Manifest], kind: str, path: str, value: object) -> None:
    """Sets what a dotted path leads to; every step of it must be there."""
    *steps, last = path.split(".")
    node: Any = m.of_kind(manifests, kind)[0]
    for step in steps:
        node = node[int(step)] if step.isdigit() else node[step]
    node[last] = value


POD, SERVER = "spec.template.spec", "spec.template.spec.containers.0"
MUTATIONS = [
    ("settings", "ConfigMap", "data.SOLO_MAX_BACTH", "4", "SOLO_MAX_BACTH is no setting"),
    ("settings", "ConfigMap", "data.SOLO_DEVICE", "tpu", "input_value='tpu'"),
    ("settings", "ConfigMap", "data.SOLO_ADMIN_PORT", "9001", "'admin': 9001"),
    ("settings", "ConfigMap", "data.SOLO_ADMIN_HOST", "127.0.0.1", "listens on 127.0.0.1"),
    ("settings", "Deployment", f"{POD}.enableServiceLinks", True, "SOLO_SERVE_PORT"),
    ("paths", "Deployment", f"{SERVER}.readinessProbe.httpGet.path", "/v2/ready", "no /v2/ready"),
    ("paths", "ServiceMonitor", "spec.endpoints.0.port", "http", "port http has no /metrics"),
    ("selectors", "PodDisruptionBudget", "spec.selector.matchLabels", {"app": "a"}, "Budget"),
    ("selectors", "ServiceMonitor", "spec.selector.matchLabels", {"app": "a"}, "selects 0 Serv"),
    ("selectors", "Service", "spec.ports.0.targetPort", "web", "the pod has no port web"),
    ("scaling", "HorizontalPodAutoscaler", "spec.metrics.0.pods.metric.name", "q", "no gauge q"),
    ("scaling", "Deployment", "spec.replicas", 2, "fights with the autoscaler"),
    ("scaling", "ConfigMap", "data.SOLO_MAX_BATCH", "32", "a full engine has 64"),
    ("shutdown", "Deployment", f"{POD}.terminationGracePeriodSeconds", 35, "killed after 35 s"),
    ("shutdown", "ConfigMap", "data.SOLO_DRAIN_TIMEOUT_S", "90", "may need 97.0 s"),
    ("rights", "Deployment", f"{POD}.securityContext.runAsUser", 1000, "the image as 10001:10001"),
    ("rights", "Deployment", f"{SERVER}.securityContext.readOnlyRootFilesystem", False, "too much"),
    ("volumes", "Deployment", f"{SERVER}.volumeMounts", [], "the server writes to /tmp"),
    (
        "volumes",
        "Deployment",
        f"{SERVER}.volumeMounts.0.readOnly",
        True,
        "writes to /cache/engines",
    ),
    ("resources", "ConfigMap", "data.SOLO_THREADS", "16", "4 CPUs for 16 threads"),
    ("resources", "Deployment", f"{SERVER}.resources.limits", {}, "cuda with None GPUs"),
]


def has_jobs(manifests: list[m.Manifest]) -> bool:
    return build_settings(manifests).jobs_dir is not None


@pytest.mark.parametrize("manifests", [m.JOBS], indirect=True)
def test_jobs_have_a_volume_larger_than_they_may_be(manifests: list[m.Manifest]) -> None:
    assert has_jobs(manifests)
    (claim,) = m.of_kind(manifests, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    size = claim["spec"]["resources"]["requests"]["storage"]
    assert int(size.removesuffix("Gi")) * 2**30 > build_settings(manifests).jobs_max_bytes


@pytest.mark.parametrize("manifests", [m.JOBS], indirect=True)
@pytest.mark.parametrize(
    ("name", "kind", "path", "value", "said"),
    [
        ("scaling", "Deployment", "spec.replicas", 2, "pods share the folder of jobs: 2"),
        ("scaling", "Deployment", "spec.strategy", {"type": "RollingUpdate"}, "RollingUpdate"),
        ("volumes", "ConfigMap", "data.SOLO_JOBS_DIR", "/data", "writes to /data"),
    ],
)
def test_a_check_sees_what_is_broken_with_jobs(
    manifests: list[m.Manifest], name: str, kind: str, path: str, value: object, said: str
) -> None:
    test_a_check_sees_what_is_broken(manifests, name, kind, path, value, said)


@pytest.mark.parametrize("manifests", ["overlays/gpu"], indirect=True)
@pytest.mark.parametrize(("name", "kind", "path", "value", "said"), MUTATIONS)
def test_a_check_sees_what_is_broken(
    manifests: list[m.Manifest], name: str, kind: str, path: str, value: object, said: str
) -> None:
    (check,) = [check for check in CHECKS if check.__name__ == f"check_{name}"]
    _set(manifests, kind, path, value)
    assert said in "\n".join(check(manifests))


@pytest.mark.parametrize("manifests", ["base"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", f"{SERVER}.readinesProbe", {}),
        ("HorizontalPodAutoscaler", "spec.minReplicas", "two"),
        ("Service", "spec.ports.0.port", None),
    ],
)
def test_schemas_are_strict(
    manifests: list[m.Manifest], kind: str, path: str, value: object
) -> None:
    _set(manifests, kind, path, value)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(m.of_kind(manifests, kind)[0], OLDEST, strict=True)


@pytest.mark.parametrize("manifests", ["base"], indirect=True)
def test_the_service_monitors_shape_is_strict(manifests: list[m.Manifest]) -> None:
    _set(manifests, "ServiceMonitor", "spec.endpoints.0.targetport", 9000)
    with pytest.raises(jsonschema.ValidationError, match="targetport"):
        jsonschema.validate(m.only(manifests, "ServiceMonitor"), SERVICE_MONITOR)


def test_clients_do_not_get_to_the_admin_port(manifests: list[m.Manifest]) -> None:
    services = {service["metadata"]["name"]: service for service in m.of_kind(manifests, "Service")}
    assert [port["targetPort"] for port in services["solo-serve"]["spec"]["ports"]] == ["http"]
    assert services["solo-serve-metrics"]["spec"]["clusterIP"] == "None"
    rules = m.only(manifests, "NetworkPolicy")["spec"]["ingress"]
    sources = {rule["ports"][0]["port"]: rule.get("from") for rule in rules}
    assert set(sources) == {"http", "admin"}
    assert sources["http"] is None
    assert sources["admin"]


def test_the_job_is_the_one_of_the_alert_rules(manifests: list[m.Manifest]) -> None:
    label = m.only(manifests, "ServiceMonitor")["spec"]["jobLabel"]
    (service,) = [s for s in m.of_kind(manifests, "Service") if "clusterIP" in s["spec"]]
    job = service["metadata"]["labels"][label]
    assert f'job="{job}"' in (m.ROOT / "docker/prometheus/rules.yml").read_text(encoding="utf-8")


def test_an_update_takes_nothing_away(manifests: list[m.Manifest]) -> None:
    deployment = m.only(manifests, "Deployment")["spec"]
    if not has_jobs(manifests):  # their volume goes from pod to pod
        assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    name = m.only(manifests, "ConfigMap")["metadata"]["name"]
    assert name.startswith("solo-serve-")  # a hash: other settings are another pod template
    assert m.container(manifests)["envFrom"] == [{"configMapRef": {"name": name}}]
    startup = m.container(manifests)["startupProbe"]
    start_s = startup["periodSeconds"] * startup["failureThreshold"]
    assert deployment.get("progressDeadlineSeconds", 600) > start_s


def test_an_eviction_leaves_someone_to_serve(manifests: list[m.Manifest]) -> None:
    unavailable = m.only(manifests, "PodDisruptionBudget")["spec"]["maxUnavailable"]
    if has_jobs(manifests):  # the only pod; otherwise its node could not be drained
        assert unavailable == 1
        return
    assert m.only(manifests, "HorizontalPodAutoscaler")["spec"]["minReplicas"] > unavailable >= 1


def test_images_are_those_of_the_project(manifests: list[m.Manifest]) -> None:
    compose = yaml.safe_load((m.ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    project = tomllib.loads((m.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    image = m.container(manifests)["image"]
    defaults = {
        service["image"].split(":-")[-1].rstrip("}") for service in compose["services"].values()
    }
    assert image in defaults
    assert image.removesuffix("-gpu") == f"{project['name']}:{project['version']}"


@pytest.mark.parametrize("manifests", [m.ALL], indirect=True)
def test_components_go_together_with_the_gpu(manifests: list[m.Manifest]) -> None:
    settings = build_settings(manifests)
    assert settings.device == "cuda"
    assert settings.keys_file is not None
    assert settings.model_poll_s > 0
    mounts = {mount["mountPath"] for mount in m.container(manifests)["volumeMounts"]}
    assert mounts == {"/tmp", "/cache", "/models", str(settings.keys_file.parent)}
    assert m.container(manifests)["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("manifests", ["base"], indirect=True)
def test_the_adapter_offers_what_the_autoscaler_asks_for(manifests: list[m.Manifest]) -> None:
    text = (m.KUBERNETES / "prometheus-adapter.yaml").read_text(encoding="utf-8")
    (rule,) = yaml.safe_load(text)["rules"]
    (metric,) = m.only(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert rule["name"]["matches"] == f"^{rule['name']['as']}$"
    assert rule["resources"]["overrides"] == {
        "namespace": {"resource": "namespace"},
        "pod": {"resource": "pod"},
    }
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
    query = query.replace("<<.LabelMatchers>>", 'namespace="default",pod=~"a|b"')
    query = query.replace("<<.Series>>", rule["name"]["as"])
    assert "<<" not in query
    for expression in (rule["seriesQuery"], query):
        names = {name for name in metric_names(expression) if name.startswith("solo_")}
        assert names == {metric["pods"]["metric"]["name"]}
        assert f"# TYPE {names.pop()} gauge" in render(Metrics())


def test_the_overlay_of_the_page_can_be_built(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    kustomization = yaml.safe_load(block)
    own = m.KUBERNETES / "overlays/own"  # where its paths are meant
    for field in ("resources", "components"):
        kustomization[field] = [os.path.normpath(own / path) for path in kustomization[field]]
    built = m.kustomize_here(kustomization, tmp_path)
    assert m.container(built)["image"] == "registry.example.com/solo-serve:0.2.0-gpu"
    assert build_settings(built).request_timeout_ms == 5000


def test_the_page_names_what_there_is() -> None:
    named = {name.lower() for name in re.findall(r"SOLO_([A-Z_]+\w)", PAGE)}
    assert len(named) > 8
    assert named <= set(Settings.model_fields)
    parts = re.findall(r"^\| `([^`]+)`", PAGE, re.MULTILINE)
    assert {*m.OVERLAYS, *m.COMPONENTS} <= set(parts)
    assert [part for part in parts if not (m.KUBERNETES / part).exists()] == []
    assert (
        f"Kubernetes {OLDEST} and {kubernetes_validate.latest_version().rpartition('.')[0]}" in PAGE
    )
