from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.backends.launcher import Launcher
from tests.support.kernel_host import (
    COMPILER,
    HostLauncher,
    Uploads,
    build_library,
    has_compiler,
    load_gpu,
)


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
def host_launcher(kernel_library: Path) -> HostLauncher:
    return HostLauncher(kernel_library)


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
