"""The servers that are compared: how each is installed and started, and with which settings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.harness.report import ROOT
from benchmarks.harness.server import Server, serve
from benchmarks.inputs import Workload
from benchmarks.servers.common import CORES, HOST, MODEL

ENVIRONMENTS = ROOT / ".venv-servers"
REQUIREMENTS = Path(__file__).parent / "requirements"
OURS = "solo-serve"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A server.

    Attributes:
        name: In options and reports.
        environment: Its virtual environment, also the name of its requirements; None: this one.
        package: Distribution whose version is reported.
        arguments: Of `python`; `{port}`, `{repo}` and `{cores}` are replaced.
        variables: Of its environment.
        settings: What was chosen for it, in words.
        same_engine: Whether it runs the engine of all others, so that its answers must be ours.
    """

    name: str
    environment: str | None
    package: str
    arguments: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    settings: str
    same_engine: bool = True

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        if self.environment is None:
            return Path(sys.executable)
        return ENVIRONMENTS / self.environment / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether its environment is complete."""
        return self.environment is None or (self._stamp.is_file() and self.python.exists())

    @property
    def _stamp(self) -> Path:
        return ENVIRONMENTS / str(self.environment) / ".installed"

    def install(self) -> None:
        """Makes its environment anew, with the pinned versions.

        Raises:
            subprocess.CalledProcessError: pip failed.
        """
        if self.environment is None:
            return
        folder = ENVIRONMENTS / self.environment
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        files = [REQUIREMENTS / f"{name}.txt" for name in (self.environment, "pipeline")]
        pins = [part for file in files for part in ("--requirement", str(file))]
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", *pins], check=True)
        self._stamp.touch()

    def read_version(self) -> str:
        """The installed version."""
        code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        command = [str(self.python), "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def run(self, workload: Workload, cores: int, log: Path) -> AbstractContextManager[Server]:
        """The server of a workload's model, once it answers an image.

        If it does not start it is started once more: Ray gives up early on a busy machine.
        """
        repo = str(workload.model.parent.absolute())
        places = {"port": "{port}", "repo": repo, "cores": str(cores)}
        body = next(iter(workload.images.values()))
        return serve(
            [str(self.python), *(part.format(**places) for part in self.arguments)],
            lambda url: answers(url, body),
            log=log,
            environment={
                MODEL: str(workload.model.absolute()),
                CORES: str(cores),
                "PYTHONPATH": str(ROOT),
                "ORT_DISABLE_TELEMETRY": "1",
                **self.variables,
            },
            attempts=2,
        )


def answers(url: str, body: bytes) -> bool:
    """Whether a server segments an image."""
    try:
        return httpx.post(f"{url}/segment", content=body, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def describe_missing(contenders: Iterable[Contender]) -> list[str]:
    """A line for each that is not installed, with the command that installs it."""
    return [
        f"{contender.name} is not installed and is left out: "
        f"python -m benchmarks serving --install --servers {contender.name}"
        for contender in contenders
        if not contender.is_installed
    ]


_SERVE = (
    *("-m", "service", "--model-repo", "{repo}", "--port", "{port}"),
    *("--device", "cpu", "--log-level", "warning"),
)
_SAME_ENGINE = ("--engine", "ort", "--precision", "fp32")
"""That of `SharedEngine`, which the others use."""
_ALL = (
    Contender(
        name=OURS,
        environment=None,
        package="solo-serve",
        arguments=(*_SERVE, *_SAME_ENGINE, "--workers", "{cores}"),
        settings="a worker process for each core; no log line for each request",
    ),
    Contender(
        name="solo-serve-single",
        environment=None,
        package="solo-serve",
        arguments=(*_SERVE, *_SAME_ENGINE, "--threads", "1", "--engine-slots", "{cores}"),
        settings="one process, an engine slot for each core; no log line for each request",
    ),
    Contender(
        name="solo-serve-auto",
        environment=None,
        package="solo-serve",
        arguments=(*_SERVE, "--threads", "1", "--engine-slots", "{cores}"),
        settings="as solo-serve-single, with the engine and precision that it chooses",
        same_engine=False,
    ),
    Contender(
        name="fastapi",
        environment="fastapi",
        package="fastapi",
        arguments=("-m", "benchmarks.servers.fastapi_server"),
        settings="one process, a thread of the pool and of the engine for each core",
    ),
    Contender(
        name="fastapi-workers",
        environment="fastapi",
        package="fastapi",
        arguments=("-m", "benchmarks.servers.fastapi_server"),
        variables={"SERVING_WORKERS": "cores"},
        settings="a process for each core, with an engine of its own",
    ),
    Contender(
        name="litserve",
        environment="litserve",
        package="litserve",
        arguments=("-m", "benchmarks.servers.litserve_server"),
        settings="a worker for each core, batches of up to 8 within 5 ms, fast_queue, as many API "
        "servers as workers (its default)",
    ),
    Contender(
        name="bentoml",
        environment="bentoml",
        package="bentoml",
        arguments=(
            *("-m", "bentoml", "serve", "benchmarks.servers.bentoml_server:BentoSegmenter"),
            *("--host", HOST, "--port", "{port}"),
        ),
        variables={"BENTOML_DO_NOT_TRACK": "True"},
        settings="a worker for each core with one thread, no access log",
    ),
    Contender(
        name="ray-serve",
        environment="ray",
        package="ray",
        arguments=("-m", "benchmarks.servers.ray_server"),
        variables={
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
        },
        settings="a replica for each core, batches of up to 8 within 5 ms, its options for high "
        "throughput (HAProxy, requests straight to the replicas)",
    ),
)
CONTENDERS = {contender.name: contender for contender in _ALL}


def install(names: Iterable[str]) -> None:
    """Makes the environments of these servers; one that several share is made once."""
    needed = {CONTENDERS[name].environment: CONTENDERS[name] for name in names}
    for contender in needed.values():
        contender.install()
