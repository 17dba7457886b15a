"""The Kubernetes manifests as kubectl's own kustomize builds them, and what is read from them."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.test_dockerfiles import last_stage

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "docker/kubernetes"
JOBS = "overlays/jobs"
OVERLAYS = ("base", "overlays/gpu", "overlays/models-on-a-volume", JOBS)
COMPONENTS = ("components/api-keys", "components/models-on-a-volume")
ALL = "overlays/gpu with all components"
BUILDS = (*OVERLAYS, ALL)

Manifest = dict[str, Any]


def find_kubectl() -> str | None:
    """The command, also of this environment, or None; `kubectl kustomize` asks no cluster."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return shutil.which("kubectl", path=os.pathsep.join(folders))


def kustomize(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    command = [find_kubectl() or "kubectl", "kustomize", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    assert built.stderr == "", built.stderr  # deprecations
    return list(yaml.safe_load_all(built.stdout))


def kustomize_here(kustomization: Manifest, folder: Path) -> list[Manifest]:
    """What a kustomization would be built to whose resources and components are absolute paths."""
    relative = {
        field: [os.path.relpath(path, folder.resolve()) for path in kustomization[field]]
        for field in ("resources", "components")
    }
    text = yaml.safe_dump({**kustomization, **relative})
    (folder / "kustomization.yaml").write_text(text, encoding="utf-8")
    return kustomize(folder)


@cache
def _build(name: str, scratch: Path) -> list[Manifest]:
    if name != ALL:
        return kustomize(KUBERNETES / name)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [KUBERNETES / "overlays/gpu"],
        "components": [KUBERNETES / part for part in COMPONENTS],
    }
    return kustomize_here(kustomization, scratch)


def build(name: str, scratch: Path) -> list[Manifest]:
    """A copy of one of `BUILDS`.

    Args:
        name: Which one.
        scratch: Empty folder for the kustomization that takes all components.
    """
    return copy.deepcopy(_build(name, scratch))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """All of a kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def only(manifests: list[Manifest], kind: str) -> Manifest:
    """The one of its kind."""
    (found,) = of_kind(manifests, kind)
    return found


def pod(manifests: list[Manifest]) -> Manifest:
    """The pod's specification."""
    spec: Manifest = only(manifests, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(manifests: list[Manifest]) -> Manifest:
    """The server's container."""
    (server,) = pod(manifests)["containers"]
    found: Manifest = server
    return found


def ports(manifests: list[Manifest]) -> dict[str, int]:
    """The container's, by name."""
    return {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}


def dockerfile(manifests: list[Manifest]) -> str:
    """Of the image that the container runs."""
    is_gpu = container(manifests)["image"].endswith("-gpu")
    return "docker/Dockerfile.gpu" if is_gpu else "docker/Dockerfile"


def image_environment(manifests: list[Manifest]) -> dict[str, str]:
    """What the image's ENV sets."""
    (line,) = [rest for word, rest in last_stage(dockerfile(manifests)) if word == "ENV"]
    return dict(pair.split("=", 1) for pair in line.split())


def environment(manifests: list[Manifest]) -> dict[str, str]:
    """What the server sees: the image's variables, over them the ConfigMap's."""
    data: dict[str, str] = only(manifests, "ConfigMap")["data"]
    return {**image_environment(manifests), **data}
