from __future__ import annotations

from pathlib import Path

import pytest

from service.engines.base import BackendError
from service.engines.kernels import nvrtc
from service.engines.kernels import prebuild as module
from service.engines.kernels.nvrtc import SOURCES, load_cubins
from service.engines.kernels.prebuild import main, prebuild


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What a stand-in for the compiler was asked for."""
    calls: list[tuple[str, str]] = []

    def compile_cubin(name: str, architecture: str) -> bytes:
        if architecture == "sm_1":
            raise BackendError("NVRTC refuses sm_1")
        calls.append((name, architecture))
        return f"{name} {architecture}".encode()

    monkeypatch.setattr(module, "compile_cubin", compile_cubin)
    monkeypatch.setattr(module, "compiler_version", lambda: "13.0 (1)")
    return calls


def test_the_service_finds_what_was_prebuilt(
    compiled: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise BackendError("there is no compiler on the server")

    monkeypatch.setattr(nvrtc, "compiler_version", refuse)
    paths = prebuild(tmp_path, ["sm_80", "sm_90"])
    assert len(paths) == 2 * len(SOURCES)
    found = load_cubins((8, 6), cache=None, prebuilt=(tmp_path,))
    assert found == {name: f"{name} sm_80".encode() for name in SOURCES}
    with pytest.raises(BackendError, match="no compiler on the server"):
        load_cubins((7, 5), cache=None, prebuilt=(tmp_path,))


def test_what_is_there_is_not_compiled_again(
    compiled: list[tuple[str, str]], tmp_path: Path
) -> None:
    first = prebuild(tmp_path, ["sm_80"])
    assert prebuild(tmp_path, ["sm_80"]) == first
    assert len(compiled) == len(SOURCES)
    first[0].write_bytes(b"damaged")
    prebuild(tmp_path, ["sm_80"])
    assert len(compiled) == len(SOURCES) + 1


def test_the_command_names_the_files(
    compiled: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--folder", str(tmp_path), "--architectures", "sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(map(str, tmp_path.iterdir()))


def test_the_command_says_why_it_failed(
    compiled: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--folder", str(tmp_path), "--architectures", "sm_1"]) == 1
    assert "NVRTC refuses sm_1" in capsys.readouterr().err
