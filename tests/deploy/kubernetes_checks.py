"""What must hold between the manifests, the images and the server; each check lists what is wrong.

They are functions of the manifests, so that a test can break a manifest and see them fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from service.engines.kernels.nvrtc import default_cache
from service.http.app import create_admin_app, create_app
from service.http.servers import FLUSH_S
from service.observe.metrics import Metrics
from service.settings import Settings
from tests.deploy import manifests as m
from tests.deploy.test_dockerfiles import last_stage
from tests.support.metrics import render

PREFIX = "SOLO_"


def build_settings(manifests: list[m.Manifest]) -> Settings:
    """The server's settings in the pod; raises for a wrong value."""
    variables = m.environment(manifests)
    values = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in variables.items()
        if name.startswith(PREFIX)
    }
    return Settings.model_validate(values)


def check_settings(manifests: list[m.Manifest]) -> Iterator[str]:
    """Variables are settings with valid values, and the ports are those that are declared."""
    for name in m.only(manifests, "ConfigMap")["data"]:
        if name.removeprefix(PREFIX).lower() not in Settings.model_fields:
            yield f"{name} is no setting"
            return
    try:
        settings = build_settings(manifests)
    except ValueError as error:
        yield str(error)
        return
    wanted = {"http": settings.port, "admin": settings.admin_port}
    if m.ports(manifests) != wanted:
        yield f"the container's ports are {m.ports(manifests)}, the server's {wanted}"
    for host in (settings.host, settings.admin_host):
        if host != "0.0.0.0":
            yield f"the server listens on {host}, which the pod's address is not"
    if m.pod(manifests).get("enableServiceLinks") is not False:
        yield "a Service's variables (SOLO_SERVE_PORT) come in beside the settings"


def check_paths(manifests: list[m.Manifest]) -> Iterator[str]:
    """Probes and Prometheus ask for routes that the port has."""
    app = create_app(build_settings(manifests))
    applications = {"http": app, "admin": create_admin_app(app)}
    routes = {port: set(part.openapi()["paths"]) for port, part in applications.items()}
    container = m.container(manifests)
    asked = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    asked += m.only(manifests, "ServiceMonitor")["spec"]["endpoints"]
    for request in asked:
        if request["path"] not in routes.get(request["port"], set()):
            yield f"port {request['port']} has no {request['path']}"


def check_selectors(manifests: list[m.Manifest]) -> Iterator[str]:
    """Everything that selects pods or Services finds them, with the ports that it names."""
    deployment = m.only(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    selectors = {"Deployment": deployment["spec"]["selector"]["matchLabels"]}
    for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        selectors[kind] = m.only(manifests, kind)["spec"][field]["matchLabels"]
    for spread in m.pod(manifests)["topologySpreadConstraints"]:
        selectors[spread["topologyKey"]] = spread["labelSelector"]["matchLabels"]
    services = m.of_kind(manifests, "Service")
    for service in services:
        selectors[f"Service {service['metadata']['name']}"] = service["spec"]["selector"]
        for port in service["spec"]["ports"]:
            if port["targetPort"] not in m.ports(manifests):
                yield f"{service['metadata']['name']}: the pod has no port {port['targetPort']}"
    for name, selector in selectors.items():
        if not selector or not selector.items() <= labels:
            yield f"{name} selects {selector}, the pods have {dict(labels)}"
    monitor = m.only(manifests, "ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    watched = [service for service in services if wanted <= service["metadata"]["labels"].items()]
    if [service["metadata"]["name"] for service in watched] != ["solo-serve-metrics"]:
        yield f"the ServiceMonitor selects {len(watched)} Services, not the one with metrics"
    for endpoint in monitor["endpoints"]:
        names = [port["name"] for service in watched for port in service["spec"]["ports"]]
        if endpoint["port"] not in names:
            yield f"the ServiceMonitor's port {endpoint['port']} is none of {names}"


def check_scaling(manifests: list[m.Manifest]) -> Iterator[str]:
    """The autoscaler follows the Deployment by a gauge of ours, at a full engine's load.

    With jobs there is one pod and never a second: their folder is its own.
    """
    if build_settings(manifests).jobs_dir is not None:
        spec = m.only(manifests, "Deployment")["spec"]
        if (spec.get("replicas"), spec["strategy"]) != (1, {"type": "Recreate"}):
            yield f"pods share the folder of jobs: {spec.get('replicas')}, {spec['strategy']}"
        if m.of_kind(manifests, "HorizontalPodAutoscaler"):
            yield "the autoscaler adds pods that have other jobs"
        return
    scaler = m.only(manifests, "HorizontalPodAutoscaler")["spec"]
    deployment = m.only(manifests, "Deployment")
    target = scaler["scaleTargetRef"]
    if (target["kind"], target["name"]) != ("Deployment", deployment["metadata"]["name"]):
        yield f"it scales {target}"
    if "replicas" in deployment["spec"]:
        yield "the Deployment sets replicas, which fights with the autoscaler"
    settings = build_settings(manifests)
    full = settings.max_batch * (settings.engine_slots or 1)
    families = set(re.findall(r"^# TYPE (\w+) gauge$", render(Metrics()), re.MULTILINE))
    for metric in scaler["metrics"]:
        name = metric["pods"]["metric"]["name"]
        if name not in families:
            yield f"the server has no gauge {name}"
        value = metric["pods"]["target"]["averageValue"]
        if value != str(full):
            yield f"the target is {value} canvases, a full engine has {full}"


def check_shutdown(manifests: list[m.Manifest]) -> Iterator[str]:
    """The pod outlives preStop, draining, open connections, and the admin port's end."""
    command, seconds = m.container(manifests)["lifecycle"]["preStop"]["exec"]["command"]
    if command != "sleep":
        yield f"preStop runs {command}"
    drain_s = build_settings(manifests).drain_timeout_s
    needed_s = int(seconds) + drain_s + 2 * FLUSH_S
    grace_s = m.pod(manifests)["terminationGracePeriodSeconds"]
    if grace_s <= needed_s:
        yield f"the pod is killed after {grace_s} s and may need {needed_s} s"


def check_rights(manifests: list[m.Manifest]) -> Iterator[str]:
    """The user is the image's, and nothing more is allowed than the server needs."""
    (user,) = [rest for word, rest in last_stage(m.dockerfile(manifests)) if word == "USER"]
    pod, container = m.pod(manifests)["securityContext"], m.container(manifests)["securityContext"]
    if f"{pod['runAsUser']}:{pod['runAsGroup']}" != user or pod["fsGroup"] != pod["runAsGroup"]:
        yield f"the pod runs as {pod}, the image as {user}"
    if not pod["runAsNonRoot"] or pod["seccompProfile"] != {"type": "RuntimeDefault"}:
        yield f"the pod may too much: {pod}"
    if container != {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }:
        yield f"the container may too much: {container}"
    if m.pod(manifests).get("automountServiceAccountToken") is not False:
        yield "the pod gets a token of the cluster's API, which the server never asks"


def check_volumes(manifests: list[m.Manifest]) -> Iterator[str]:
    """Where the server writes there is a writable volume; what it only reads is read-only.

    XDG_CACHE_HOME must be set as in the image while this is called.
    """
    mounts = {mount["mountPath"]: mount for mount in m.container(manifests)["volumeMounts"]}
    volumes = {volume["name"] for volume in m.pod(manifests)["volumes"]}
    if {mount["name"] for mount in mounts.values()} != volumes:
        yield f"mounted are {mounts}, there are {volumes}"
    settings = build_settings(manifests)
    written = ["/tmp"]
    if settings.device != "cpu":
        written += [str(settings.engine_cache), str(default_cache())]
    if settings.jobs_dir is not None:
        written.append(str(settings.jobs_dir))
    for path in written:
        above = [str(folder) for folder in (PurePosixPath(path), *PurePosixPath(path).parents)]
        mount = next((mounts[folder] for folder in above if folder in mounts), None)
        if mount is None or mount.get("readOnly"):
            yield f"the server writes to {path}, which is read-only"
    read = [settings.model_repo, settings.keys_file.parent if settings.keys_file else None]
    for folder in filter(None, read):
        mount = mounts.get(str(folder))
        if mount is not None and not mount.get("readOnly"):
            yield f"{folder} is writable"
    claims = {claim["metadata"]["name"] for claim in m.of_kind(manifests, "PersistentVolumeClaim")}
    for volume in m.pod(manifests)["volumes"]:
        name = volume.get("persistentVolumeClaim", {}).get("claimName")
        if name is not None and name not in claims:
            yield f"there is no claim {name}"


def check_resources(manifests: list[m.Manifest]) -> Iterator[str]:
    """The requested CPUs are the engine's threads; a GPU is asked for where CUDA is."""
    resources = m.container(manifests)["resources"]
    settings = build_settings(manifests)
    cpus = resources["requests"]["cpu"]
    if cpus != str(settings.threads) or cpus != str(settings.pool_threads):
        yield f"{cpus} CPUs for {settings.threads} threads, {settings.pool_threads} in a pool"
    gpus = resources["limits"].get("nvidia.com/gpu")
    if (gpus == "1") != (settings.device == "cuda"):
        yield f"device {settings.device} with {gpus} GPUs"


CHECKS = (
    *(check_settings, check_paths, check_selectors, check_scaling),
    *(check_shutdown, check_rights, check_volumes, check_resources),
)
