"""gRPC is optional."""

from __future__ import annotations

import subprocess
import sys

import pytest

from service.errors import StartupError
from service.grpc.front import build_front_ends
from service.settings import Settings
from tests.support.server import ROOT

_HIDE = "import sys; sys.modules['grpc'] = sys.modules['google.protobuf'] = None; "


def test_without_a_port_there_is_no_front_end() -> None:
    assert build_front_ends(Settings()) == []


def test_the_service_needs_no_grpc_without_a_port() -> None:
    code = f"{_HIDE}import service.__main__, service.scale.workers.child"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_port_without_the_extra_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("service.grpc.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(StartupError, match="SOLO_GRPC_PORT needs the extra 'grpc'"):
        build_front_ends(Settings(grpc_port=0))
