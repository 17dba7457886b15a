from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.device_slots import Rig
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_tensorrt import FakeTensorrt


@pytest.fixture
def install_tensorrt(
    monkeypatch: pytest.MonkeyPatch, fake_cuda: FakeCuda
) -> Callable[[str], FakeTensorrt]:
    """Makes `import tensorrt` give a fake of some version."""

    def install_version(version: str) -> FakeTensorrt:
        fake = FakeTensorrt(fake_cuda, version)
        install(monkeypatch, "tensorrt", fake.module)
        return fake

    return install_version


@pytest.fixture
def fake_tensorrt(install_tensorrt: Callable[[str], FakeTensorrt]) -> FakeTensorrt:
    return install_tensorrt("10.16.1.11")


@pytest.fixture
def rig(fake_cuda: FakeCuda) -> Rig:
    return Rig(fake_cuda)


@pytest.fixture(params=["on the device", "on the host"])
def either(request: pytest.FixtureRequest, fake_cuda: FakeCuda) -> Rig:
    """A slot whose candidates stay on the device, and one whose candidates are copied."""
    if request.param == "on the host":
        rig = Rig(fake_cuda)
        rig.slot._select = None
        return rig
    return Rig(fake_cuda)


def install(monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> None:
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
