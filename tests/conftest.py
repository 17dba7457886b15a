from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.engines.device import CudaDevice
from service.engines.kernels.launcher import Launcher
from tests.support.fake_cuda import FakeCuda
from tests.support.kernel_host import (
    COMPILER,
    HostLauncher,
    Uploads,
    build_library,
    has_compiler,
    load_gpu,
)
from tests.support.parity_files import SHARED, WITHOUT_SHARED, has_shared
from tests.support.time_limit import TimeLimits

TOGETHER = {
    # Two clusters at once are too much for a machine.
    "tests/integration/test_predict_on_ray.py": "ray",
    "tests/reliability/test_cluster.py": "ray",
    "tests/service/predict/test_ray_job.py": "ray",
    # Exported networks, which are kept.
    "tests/export/test_exit_graph.py": "tiny_graph",
    "tests/export/test_exits.py": "tiny_graph",
    "tests/export/test_gpu_graph.py": "tiny_graph",
    "tests/export/test_onnx_graph.py": "tiny_graph",
}
"""Files that one process takes, where several share the tests; else each file is on its own."""


def group_of(nodeid: str) -> str:
    """What of the tests one process takes as a whole."""
    file, _, test = nodeid.partition("::")
    if file.startswith("tests/service/http/routes/") and "[ray" in test:
        return "ray"
    return TOGETHER.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Sends the groups to the processes; `--dist loadgroup` of xdist 3.8 sees none in pytest 9."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

        def remove_node(self, node: Any) -> str | None:
            """Returns the test that ended a worker; xdist alone would run it again and again."""
            units = self.assigned_work[node].values()
            open_tests = [test for unit in units for test, done in unit.items() if not done]
            if open_tests:
                self.assigned_work[node][group_of(open_tests[0])][open_tests[0]] = True
            super().remove_node(node)
            return open_tests[0] if open_tests else None

    return Groups(config, log)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(TimeLimits())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for a package index begin before all others."""
    items.sort(key=lambda item: item.get_closest_marker("network") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says in one line which parity fixtures the parity tests used."""
    ran = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    if any("tests/training/parity/" in report.nodeid for report in ran):
        found = f"{SHARED} was used" if has_shared() else f"only a part was used: {WITHOUT_SHARED}"
        terminalreporter.line(f"parity fixtures: {found}")


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> None:
    """The garbage collector leaves alone what is there when a module's tests begin.

    Networks and their exported graphs are millions of objects; looking through them again and
    again takes longer than many a test.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def kernel_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels, compiled for the host."""
    if not has_compiler():
        pytest.skip(f"{COMPILER} is not installed")
    return build_library(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A fake in the place of `cuda.core`."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    return cuda


@pytest.fixture
def host_launcher(kernel_library: Path, fake_cuda: FakeCuda) -> HostLauncher:
    return HostLauncher(kernel_library, CudaDevice(), fake_cuda)


@pytest.fixture(params=["host", "gpu"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """The same cases run on the host and, where there is one, on a GPU."""
    if request.param == "host":
        host: HostLauncher = request.getfixturevalue("host_launcher")
        return host
    gpu = load_gpu()
    if isinstance(gpu, str):
        pytest.skip(f"no GPU: {gpu}")
    return gpu


@pytest.fixture
def uploads(launcher: Launcher) -> Iterator[Uploads]:
    arrays = Uploads(launcher)
    yield arrays
    arrays.close()
