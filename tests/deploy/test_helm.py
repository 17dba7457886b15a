"""The Helm chart gives the objects that kustomize builds; linted and rendered by Helm itself."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.deploy.manifests import JOBS, Manifest, build, find_kubectl, of_kind, only

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "docker/helm/solo-serve"
HELM = shutil.which("helm")
HAS_LIBRARY = importlib.util.find_spec("helm_python") is not None

needs_helm = pytest.mark.skipif(
    HELM is None and not HAS_LIBRARY,
    reason="neither helm nor its library (pip install helm-python-sdk, 80 MB) is installed",
)


def render(*files: str, **values: Any) -> list[Manifest]:
    """The objects of the chart; raises what Helm raises."""
    given = [yaml.safe_load((CHART / file).read_text("utf-8")) for file in files]
    merged: dict[str, Any] = {}
    for each in [*given, values]:
        merge(merged, each)
    if HELM is not None:
        command = [
            HELM,
            "template",
            "solo",
            str(CHART),
            "--kube-version",
            "1.30.0",
            "--values",
            "-",
        ]
        done = subprocess.run(
            command, input=json.dumps(merged), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ValueError(done.stderr)
        texts = [done.stdout]
    else:
        library = importlib.import_module("helm_python")
        with library.Chart.load(str(CHART)) as chart:
            try:
                texts = list(chart.render(values=merged, name="solo").values())
            except library.HelmError as error:
                raise ValueError(str(error)) from error
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def normalize(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    """By kind and name, without what the two ways of restarting pods for new settings add."""
    found = {}
    for manifest in manifests:
        text = re.sub(r"\bsolo-serve-[a-z0-9]{10}\b", "solo-serve", json.dumps(manifest))
        plain: Manifest = json.loads(text)
        if plain["kind"] == "ConfigMap":
            plain["metadata"].pop("labels", None)
        if plain["kind"] == "Deployment":
            template = plain["spec"]["template"]
            template["metadata"].pop("annotations", None)
            template["spec"]["volumes"].sort(key=lambda volume: str(volume["name"]))
            mounts = template["spec"]["containers"][0]["volumeMounts"]
            mounts.sort(key=lambda mount: str(mount["name"]))
        found[plain["kind"], plain["metadata"]["name"]] = plain
    return found


@needs_helm
@pytest.mark.skipif(find_kubectl() is None, reason="kubectl is not installed")
@pytest.mark.parametrize(
    ("overlay", "files", "values"),
    [
        ("base", (), {}),
        ("overlays/gpu", ("values-gpu.yaml",), {}),
        (JOBS, (), {"jobs": {"enabled": True}}),
    ],
)
def test_the_chart_and_kustomize_give_the_same_objects(
    overlay: str, files: tuple[str, ...], values: dict[str, Any], tmp_path: Path
) -> None:
    chart, kustomized = normalize(render(*files, **values)), normalize(build(overlay, tmp_path))
    assert len(chart) >= 8
    assert set(chart) == set(kustomized)
    for name, manifest in chart.items():
        assert manifest == kustomized[name], name


@needs_helm
def test_it_scales_on_queued_canvases() -> None:
    spec = only(
        render(autoscaling={"maxReplicas": 3, "queuedCanvases": "12"}), "HorizontalPodAutoscaler"
    )["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 3)
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == "solo_queue_canvases"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "12"}


@needs_helm
def test_models_keys_and_settings() -> None:
    rendered = render(
        models={"claim": "mine"},
        apiKeys={"secret": "secret"},
        settings={"SOLO_WORKERS": 2, "SOLO_MIN_RATE": 0.5, "SOLO_MODEL_CONTROL": True},
        serviceMonitor={"enabled": False},
    )
    data = only(rendered, "ConfigMap")["data"]
    assert all(isinstance(value, str) for value in data.values())
    assert data["SOLO_MODEL_POLL_S"] == "30"
    assert data["SOLO_KEYS_FILE"] == "/etc/solo-serve/keys.json"
    assert (data["SOLO_WORKERS"], data["SOLO_MIN_RATE"], data["SOLO_MODEL_CONTROL"]) == (
        "2",
        "0.5",
        "true",
    )
    spec = only(rendered, "Deployment")["spec"]["template"]["spec"]
    (server,) = spec["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert mounts == {"tmp": "/tmp", "models": "/models", "keys": "/etc/solo-serve"}
    assert {volume["name"] for volume in spec["volumes"]} == set(mounts)
    assert of_kind(rendered, "ServiceMonitor") == []


@needs_helm
def test_jobs_are_off_by_default_and_may_end_with_the_pod() -> None:
    assert "SOLO_JOBS_DIR" not in only(render(), "ConfigMap")["data"]
    files = ("values-gpu.yaml",)
    kept = render(*files, jobs={"enabled": True, "size": "9Gi", "storageClass": "fast"})
    claims = {c["metadata"]["name"]: c["spec"] for c in of_kind(kept, "PersistentVolumeClaim")}
    assert set(claims) == {"solo-serve-jobs", "solo-serve-engine-cache"}
    assert claims["solo-serve-jobs"]["storageClassName"] == "fast"
    assert claims["solo-serve-jobs"]["resources"] == {"requests": {"storage": "9Gi"}}
    lost = render(jobs={"enabled": True, "persistent": False, "size": "9Gi"})
    assert of_kind(lost, "PersistentVolumeClaim") == []
    volumes = only(lost, "Deployment")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "jobs", "emptyDir": {"sizeLimit": "9Gi"}} in volumes


@needs_helm
def test_changed_settings_restart_the_pods() -> None:
    def checksum(**settings: str) -> str:
        template = only(render(settings=settings), "Deployment")["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/settings"]
        return found

    assert checksum() == checksum()
    assert checksum() != checksum(SOLO_LOG_LEVEL="debug")


@needs_helm
@pytest.mark.parametrize(
    "values",
    [
        {"replicas": 3},
        {"image": {"name": "x"}},
        {"settings": {"WORKERS": "2"}},
        {"autoscaling": {"queuedCanvases": "none"}},
        {"startupProbe": {"periodSeconds": 0}},
        {"jobs": {"enabled": "yes"}},
        {"jobs": {"claim": "mine"}},
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(?i)schema|additional|match|minimum"):
        render(**values)


@pytest.mark.skipif(not HAS_LIBRARY, reason="helm-python-sdk is not installed")
@pytest.mark.parametrize("file", ["values.yaml", "values-gpu.yaml"])
def test_helm_lint_is_clean(file: str) -> None:
    values = yaml.safe_load((CHART / file).read_text("utf-8"))
    report = importlib.import_module("helm_python").lint(str(CHART), values, strict=True)
    assert [each for each in report["messages"] if "icon" not in json.dumps(each)] == []


@pytest.mark.parametrize("file", ["values.yaml", "values-gpu.yaml"])
def test_values_follow_the_schema_and_name_settings(file: str) -> None:
    from jsonschema import Draft7Validator

    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    Draft7Validator.check_schema(schema)
    values: dict[str, Any] = {}
    for each in ("values.yaml", file):
        merge(values, yaml.safe_load((CHART / each).read_text("utf-8")))
    assert [error.message for error in Draft7Validator(schema).iter_errors(values)] == []
    names = {name.removeprefix("SOLO_").lower() for name in values["settings"]}
    assert names <= set(Settings.model_fields)


def test_the_version_is_the_projects() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert chart["version"] == chart["appVersion"] == project["version"]
