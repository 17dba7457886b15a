"""The real Prometheus as a process, with the project's own configuration and rules."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

SOURCE = Path(__file__).resolve().parents[2] / "docker/prometheus"
WAIT_S = 60.0


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus that scrapes every second."""

    client: httpx.Client
    log: Path

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its HTTP API."""
        response = self.client.get(path, params=parameters)
        assert response.status_code == 200, (path, parameters, response.text)
        return response.json()["data"]

    def query(self, text: str) -> list[dict[str, Any]]:
        """The series that answer a query now."""
        result: list[dict[str, Any]] = self.get("/api/v1/query", query=text)["result"]
        return result

    def await_scrapes(self, count: int) -> None:
        """Waits until so many more scrapes went well."""
        deadline_s = time.monotonic() + WAIT_S
        wanted = self._count_scrapes() + count
        while self._count_scrapes() < wanted:
            assert time.monotonic() < deadline_s, self.log.read_text()[-2000:]
            time.sleep(0.2)

    def _count_scrapes(self) -> int:
        found = self.query('sum(sum_over_time(up{job="solo-serve"}[1h]))')
        return int(found[0]["value"][1]) if found else 0


def write_config(folder: Path, target: str) -> Path:
    """The project's configuration but for the target and a faster pace."""
    config = yaml.safe_load((SOURCE / "prometheus.yml").read_text("utf-8"))
    config["global"] = dict.fromkeys(config["global"], "1s")
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    del job["dns_sd_configs"]
    shutil.copy(SOURCE / "rules.yml", folder)
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@contextmanager
def run_prometheus(folder: Path, server_url: str) -> Iterator[Prometheus]:
    """Starts Prometheus on a free port, waits until it is ready, and ends it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = write_config(folder, urlsplit(server_url).netloc)
    command = ["prometheus", f"--config.file={config}", f"--web.listen-address={address}"]
    command.append(f"--storage.tsdb.path={folder / 'tsdb'}")
    log = folder / "prometheus.log"
    with (
        open(log, "wb") as output,
        httpx.Client(base_url=f"http://{address}", timeout=30, trust_env=False) as client,
        subprocess.Popen(command, stdout=output, stderr=output, cwd=folder) as process,
    ):
        try:
            _await_ready(client, process, log)
            yield Prometheus(client, log)
        finally:
            process.kill()


def _await_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if client.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"Prometheus is not ready: {log.read_text()[-2000:]}")
