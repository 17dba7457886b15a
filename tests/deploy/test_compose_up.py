"""The compose file on a real engine: start, work, faults, replacement and stop, in this order."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.images import ROOT, build_server_image, docker, find_fault, get_images
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.processes import free_port

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

IMAGE = "solo-serve:e2e"
NEXT_IMAGE = "solo-serve:e2e-next"
LOAD_THREADS = 2
SERVICES = ("server", "server-b", "proxy", "prometheus", "alertmanager")
USER = "12345:12345"
READY_S = 120.0


class Stack:
    """The services of the compose file as a project of its own.

    Args:
        folder: For models and settings.
    """

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        shutil.copytree(ROOT / "model_repo", self.models)
        self._settings = folder / "settings.env"
        self._project = f"solo-e2e-{os.getpid()}"
        names = ("SOLO_PORT", "HTTP_PORT", "HTTPS_PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT")
        self.ports = {name: free_port() for name in names}
        self._values: dict[str, object] = {
            **self.ports,
            "SERVER_IMAGE": IMAGE,
            "SERVER_USER": USER,
            "SERVER_MEMORY": "1g",
            "MODEL_DIR": self.models,
            "CONFIG_DIR": folder,
            "COMPOSE_PROFILES": "proxy",
            "PROXY_HOST": "127.0.0.1",
            "SOLO_MODEL_POLL_S": "1",
            "SOLO_DEFAULT_MODEL": "nuclei",
            "SOLO_JOBS_DIR": "/jobs",
            "SOLO_TRUSTED_PROXIES": "172.16.0.0/12,192.168.0.0/16",
        }
        self.set()

    def set(self, **values: object) -> None:
        """Changes the settings, as one changes .env."""
        self._values.update(values)
        lines = [f"{name}={value}\n" for name, value in self._values.items()]
        self._settings.write_text("".join(lines), encoding="utf-8")

    def compose(self, *arguments: str, timeout_s: float = 300) -> str:
        """What a command of Compose writes."""
        options = ("--project-name", self._project, "--env-file", str(self._settings))
        return docker("compose", *options, *arguments, timeout_s=timeout_s)

    def inspect(self, service: str) -> dict[str, Any]:
        """A container as the engine describes it."""
        (container,) = self.compose("ps", "--all", "--quiet", service).split()
        (found,) = json.loads(docker("inspect", container))
        described: dict[str, Any] = found
        return described

    def url(self, port: str, scheme: str = "http") -> str:
        """Address of a published port."""
        return f"{scheme}://localhost:{self.ports[port]}"


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    """Skips where no engine answers."""
    fault = find_fault()
    if fault is not None:
        pytest.skip(fault)


@pytest.fixture(scope="module")
def stack(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two servers behind the proxy, with monitoring; removed at the end."""
    build_server_image(IMAGE)
    docker("tag", IMAGE, NEXT_IMAGE)
    get_images(*SERVICES[2:])
    folder = tmp_path_factory.mktemp("stack")
    folder.chmod(0o755)
    found = Stack(folder)
    try:
        found.compose("up", "--detach", "--wait", "--no-build", *SERVICES)
        yield found
    except RuntimeError as error:
        raise RuntimeError(f"{error}\n{found.compose('logs', '--tail', '30')}") from error
    finally:
        found.compose("down", "--volumes", "--timeout", "10")


@pytest.fixture(scope="module")
def picture() -> bytes:
    return encode_picture(draw_picture())


@pytest.fixture(scope="module")
def outside() -> Iterator[httpx.Client]:
    """A client that accepts the certificate of the proxy's own authority."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with httpx.Client(verify=context, timeout=60, trust_env=False) as client:
        yield client


def segment(client: httpx.Client, url: str, body: bytes) -> httpx.Response:
    return client.post(f"{url}/segment", content=body, headers={"Content-Type": "image/png"})


def wait_for(what: str, holds: Callable[[], bool], seconds: float = READY_S) -> None:
    deadline_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {seconds:g} s: {what}"
        time.sleep(1)


@contextmanager
def load(stack: Stack, client: httpx.Client, body: bytes) -> Iterator[Counter[int | str]]:
    """Requests through the proxy from `LOAD_THREADS` threads; counts statuses and errors."""
    counts: Counter[int | str] = Counter()
    stop = threading.Event()
    url = stack.url("HTTPS_PORT", "https")

    def send() -> None:
        while not stop.is_set():
            try:
                counts[segment(client, url, body).status_code] += 1
            except httpx.HTTPError as error:
                counts[repr(error)] += 1

    threads = [threading.Thread(target=send, daemon=True) for _ in range(LOAD_THREADS)]
    for thread in threads:
        thread.start()
    try:
        wait_for("the load runs", lambda: counts[200] >= 8)
        yield counts
        before = counts[200]
        wait_for("the load still runs", lambda: counts[200] >= before + 8)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_all_become_healthy(stack: Stack) -> None:
    states = {name: stack.inspect(name)["State"] for name in SERVICES}
    assert {name: state["Health"]["Status"] for name, state in states.items()} == dict.fromkeys(
        SERVICES, "healthy"
    )


def test_images_are_segmented_directly_and_over_tls(
    stack: Stack, outside: httpx.Client, picture: bytes
) -> None:
    for url in (stack.url("SOLO_PORT"), stack.url("HTTPS_PORT", "https")):
        answer = segment(outside, url, picture)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "nuclei"


def test_the_operators_routes_are_not_reached_through_the_proxy(
    stack: Stack, outside: httpx.Client
) -> None:
    url = stack.url("HTTPS_PORT", "https")
    assert outside.get(f"{url}/metrics").status_code == 404
    assert outside.post(f"{url}/v2/repository/index").status_code == 404
    assert outside.get(f"{stack.url('SOLO_PORT')}/metrics").status_code == 200


def test_a_body_beyond_the_limit_is_413_at_the_proxy(stack: Stack, outside: httpx.Client) -> None:
    url = stack.url("HTTPS_PORT", "https")
    assert segment(outside, url, bytes(64 * 1024 * 1024 + 1)).status_code == 413


def test_both_servers_are_scraped(stack: Stack, outside: httpx.Client) -> None:
    def scraped() -> bool:
        parameters = {"query": 'sum(up{job="solo-serve"})'}
        answer = outside.get(f"{stack.url('PROMETHEUS_PORT')}/api/v1/query", params=parameters)
        result = answer.json()["data"]["result"]
        return bool(result) and result[0]["value"][1] == "2"

    wait_for("up is 1 twice", scraped)


def test_the_server_runs_as_any_user_and_cannot_write(stack: Stack) -> None:
    script = "id -u; id -g; for f in /app/x /models/x /opt/venv/x; do ! touch $f || exit 1; done"
    said = stack.compose("exec", "-T", "server", "sh", "-c", f"{script}; touch /tmp/x")
    assert said.split() == USER.split(":")
    host = stack.inspect("server")["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["Memory"] == host["MemorySwap"] == 1 << 30
    assert host["LogConfig"]["Config"]["max-file"] == "5"
    (binding,) = host["PortBindings"]["8000/tcp"]
    assert binding["HostIp"] == "127.0.0.1"


def test_a_published_model_is_served_without_a_restart(stack: Stack, outside: httpx.Client) -> None:
    bundled = {file.parent.name for file in stack.models.glob("*/config.json")}
    publish(stack.models)

    def names() -> set[str]:
        answer = outside.get(f"{stack.url('SOLO_PORT')}/v2/models").json()
        return {model["name"] for model in answer["models"]}

    wait_for("the new model is served, too", lambda: names() == bundled | {"blobs"})


def test_a_job_is_known_to_both_servers(
    stack: Stack, outside: httpx.Client, picture: bytes
) -> None:
    url = stack.url("HTTPS_PORT", "https")
    files = [("images", (f"{number}.png", picture, "image/png")) for number in range(4)]
    made = outside.post(f"{url}/v2/jobs", files=files)
    assert made.status_code == 202, made.text
    job = made.json()["id"]
    answers = [outside.get(f"{url}/v2/jobs/{job}") for _ in range(8)]
    assert [answer.status_code for answer in answers] == [200] * 8  # of either server
    wait_for("it is done", lambda: is_done(outside, f"{url}/v2/jobs/{job}"))


def is_done(client: httpx.Client, url: str) -> bool:
    return bool(client.get(url).json()["state"] == "done")


def test_too_little_memory_is_refused_in_one_line() -> None:
    command = ["docker", "run", "--rm", "--memory", "256m", IMAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr  # 137: killed for memory
    assert "the memory limit of 256 MiB is below the" in done.stderr


def test_upgrade_and_rollback_lose_no_request(
    stack: Stack, outside: httpx.Client, picture: bytes
) -> None:
    with load(stack, outside, picture) as counts:
        for image in (NEXT_IMAGE, IMAGE):
            stack.set(SERVER_IMAGE=image)
            for name in ("server", "server-b"):
                stack.compose("up", "--detach", "--wait", "--no-build", "--no-deps", name)
                assert stack.inspect(name)["Config"]["Image"] == image
    assert set(counts) == {200}, counts


def test_sigterm_under_load_loses_no_request(
    stack: Stack, outside: httpx.Client, picture: bytes
) -> None:
    with load(stack, outside, picture) as counts:
        stack.compose("stop", "server")
        assert stack.inspect("server")["State"]["ExitCode"] == 0
        stack.compose("start", "server")
        wait_for("healthy", lambda: is_healthy(stack, "server"))
    assert set(counts) == {200}, counts


def is_healthy(stack: Stack, service: str) -> bool:
    return bool(stack.inspect(service)["State"]["Health"]["Status"] == "healthy")


def test_a_killed_server_restarts_and_the_other_one_answers(
    stack: Stack, outside: httpx.Client, picture: bytes
) -> None:
    before = stack.inspect("server")
    with load(stack, outside, picture) as counts:
        kill = f"import os; os.kill({before['State']['Pid']}, 9)"
        options = ("--rm", "--pid", "host", "--user", "0", "--entrypoint", "python")
        docker("run", *options, IMAGE, "-c", kill)
        wait_for("restarted", lambda: stack.inspect("server")["RestartCount"] == 1)
        wait_for("healthy", lambda: is_healthy(stack, "server"))
    # The proxy cannot ask again for an answer whose first bytes had left: at most one a thread.
    cut = {key: count for key, count in counts.items() if key != 200}
    assert all("complete message body" in str(key) for key in cut), counts
    assert sum(cut.values()) <= LOAD_THREADS, counts


def test_a_stopped_server_raises_an_alert_that_reaches_alertmanager(
    stack: Stack, outside: httpx.Client
) -> None:
    stack.compose("stop", "server")

    def alerts() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = outside.get(
            f"{stack.url('ALERTMANAGER_PORT')}/api/v2/alerts"
        ).json()
        return [alert for alert in found if alert["labels"]["alertname"] == "SoloDown"]

    wait_for("SoloDown fires", lambda: bool(alerts()), 240)
    (alert,) = alerts()
    assert alert["labels"]["instance"] == "server:8000"
    assert [receiver["name"] for receiver in alert["receivers"]] == ["operators"]
    assert segment(
        outside, stack.url("HTTPS_PORT", "https"), encode_picture(draw_picture())
    ).is_success


def test_down_leaves_nothing(stack: Stack) -> None:
    stack.compose("down", "--volumes", "--timeout", "60")
    assert stack.compose("ps", "--all", "--quiet") == ""
