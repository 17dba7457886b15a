"""Who is compared: how each server is installed and started, and with which settings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.servers.model import CORES, HOST, MODEL, PORT
from benchmarks.servers.process import ServerProcesses

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv-servers"
REQUIREMENTS = Path(__file__).parent / "requirements"
OURS = "solo-serve"
ONE_BLAS_THREAD = {"OMP_NUM_THREADS": "1"}
"""For numpy's matrix products in post-processing: threads of its own in every worker would wait for
each other in busy loops. The engine's threads do not depend on it; Ray sets it by itself."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A server.

    Attributes:
        name: As it is called in options and reports.
        environment: Its virtual environment, also the name of its requirements; None: this one.
        package: Distribution whose version is reported.
        arguments: Behind `python`; `{port}`, `{repo}` and `{cores}` are replaced.
        variables: Of its environment.
        settings: What was chosen for it, in words.
    """

    name: str
    environment: str | None
    package: str
    arguments: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    settings: str

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        if self.environment is None:
            return Path(sys.executable)
        return ENVIRONMENTS / self.environment / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether its environment was made, to the end."""
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

    def start(self, model: Path, port: int, cores: int, log: Path) -> ServerProcesses:
        """Starts it; it is not ready yet."""
        places = {"port": str(port), "repo": str(model.parent.absolute()), "cores": str(cores)}
        command = [str(self.python), *(part.format(**places) for part in self.arguments)]
        variables = {
            MODEL: str(model.absolute()),
            PORT: str(port),
            CORES: str(cores),
            "PYTHONPATH": str(ROOT),
            "ORT_DISABLE_TELEMETRY": "1",
            **ONE_BLAS_THREAD,
        }
        return ServerProcesses(command, variables | self.variables, ROOT, log)


def describe_missing(contenders: Iterable[Contender]) -> list[str]:
    """A line for each that is not installed: which, and what installs it."""
    return [
        f"{contender.name} is not installed and is left out: "
        f"python -m benchmarks.serving --install {contender.name}"
        for contender in contenders
        if not contender.is_installed
    ]


_SERVE = (
    *("-m", "service", "--model-repo", "{repo}", "--port", "{port}"),
    *("--device", "cpu", "--log-level", "warning"),
)
_ALL = (
    Contender(
        name=OURS,
        environment=None,
        package="solo-serve",
        arguments=(*_SERVE, "--workers", "{cores}"),
        settings="a worker for each core; no log line for each request",
    ),
    Contender(
        name="solo-serve-single",
        environment=None,
        package="solo-serve",
        arguments=(*_SERVE, "--threads", "1", "--engine-slots", "{cores}"),
        settings="one process, a lane for each core; no log line for each request",
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
            *("-m", "bentoml", "serve", "benchmarks.servers.bentoml_server:Segmenter"),
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
