"""The cache of compiled kernels; most tests put a counting stand-in in the compiler's place."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import threading
from pathlib import Path

import pytest

from service.engines.base import BackendError
from service.engines.kernels import nvrtc
from service.engines.kernels.nvrtc import (
    ARCHITECTURES,
    SOURCES,
    compile_cubin,
    compiler_version,
    describe,
    load_cubin,
    load_cubins,
    prebuilt_path,
    read_cubin,
    write_cubin,
)

HAS_NVRTC = importlib.util.find_spec("nvidia") is not None and (
    importlib.util.find_spec("cuda") is not None
)
needs_nvrtc = pytest.mark.skipif(not HAS_NVRTC, reason="the extra gpu-kernels is not installed")
CAPABILITY = (9, 0)


class Compiler:
    """Counts what it compiles."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, str]] = []
        self.version = "13.0 (1)"

    def __call__(self, name: str, architecture: str, folder: Path = nvrtc.KERNELS) -> bytes:
        self.compiled.append((name, architecture))
        return f"{name} for {architecture}\nby {self.version}".encode()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr(nvrtc, "compile_cubin", compiler)
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: compiler.version)
    return compiler


def load(cache: Path | None, name: str = "select", prebuilt: tuple[Path, ...] = ()) -> bytes:
    return load_cubin(name, CAPABILITY, cache=cache, prebuilt=prebuilt)


def test_a_second_start_compiles_nothing(compiler: Compiler, tmp_path: Path) -> None:
    first = load_cubins(CAPABILITY, cache=tmp_path, prebuilt=())
    assert sorted(first) == sorted(SOURCES)
    assert len(compiler.compiled) == len(SOURCES)
    assert load_cubins(CAPABILITY, cache=tmp_path, prebuilt=()) == first
    assert len(compiler.compiled) == len(SOURCES)


def test_without_a_cache_each_start_compiles(compiler: Compiler) -> None:
    assert load(None) == load(None)
    assert len(compiler.compiled) == 2


class TestKey:
    """Each ingredient alone makes another cubin."""

    @pytest.fixture(autouse=True)
    def _first(self, compiler: Compiler, tmp_path: Path) -> None:
        load(tmp_path)
        assert len(compiler.compiled) == 1

    def test_source(
        self, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nvrtc, "read_source", lambda name, folder: "another source")
        load(tmp_path)
        assert len(compiler.compiled) == 2

    def test_options(
        self, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nvrtc, "OPTIONS", {**nvrtc.OPTIONS, "fma": True})
        load(tmp_path)
        assert len(compiler.compiled) == 2

    def test_architecture(self, compiler: Compiler, tmp_path: Path) -> None:
        load_cubin("select", (8, 9), cache=tmp_path, prebuilt=())
        assert compiler.compiled == [("select", "sm_90"), ("select", "sm_89")]

    def test_compiler(self, compiler: Compiler, tmp_path: Path) -> None:
        compiler.version = "13.0 (2)"
        assert load(tmp_path).endswith(b"by 13.0 (2)")
        assert len(compiler.compiled) == 2

    def test_a_file_under_another_recipes_name_is_not_used(
        self, compiler: Compiler, tmp_path: Path
    ) -> None:
        (path,) = tmp_path.iterdir()
        header, _, code = path.read_bytes().partition(b"\n")
        changed = {**json.loads(header), "architecture": "sm_75"}
        path.write_bytes(json.dumps(changed).encode() + b"\n" + code)
        load(tmp_path)
        assert len(compiler.compiled) == 2


def test_the_header_is_part_of_every_source() -> None:
    for name in SOURCES:
        source = nvrtc.read_source(name)
        assert "#include" not in source
        assert "struct BFloat16" in source


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 3],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"[1, 2]\n" + data,
        lambda data: b"{}\n" + data,
        lambda data: b"\xff\xfe" + data,
    ],
)
def test_a_damaged_cubin_is_built_again(
    compiler: Compiler, tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(damage)
    good = load(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path) == good
    assert "is damaged" in caplog.text
    assert len(compiler.compiled) == 2
    assert load(tmp_path) == good
    assert len(compiler.compiled) == 2


class TestDisk:
    """A cache that does not work costs time and a warning."""

    def test_a_folder_that_cannot_be_made(
        self, compiler: Compiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        with caplog.at_level(logging.WARNING):
            assert load(tmp_path / "file" / "cache").startswith(b"select")
        assert "are not stored" in caplog.text

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_is_read_only(
        self, compiler: Compiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tmp_path.chmod(0o500)
        with caplog.at_level(logging.WARNING):
            assert load(tmp_path).startswith(b"select")
        assert "are not stored" in caplog.text

    def test_a_full_disk_leaves_no_part_of_a_file(
        self,
        compiler: Compiler,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def refuse(source: str, target: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.replace", refuse)
        with caplog.at_level(logging.WARNING):
            assert load(tmp_path).startswith(b"select")
        assert "No space left on device" in caplog.text
        assert list(tmp_path.iterdir()) == []

    def test_a_file_that_cannot_be_read(
        self, compiler: Compiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        load(tmp_path)
        (path,) = tmp_path.iterdir()
        path.unlink()
        path.mkdir()
        with caplog.at_level(logging.WARNING):
            assert load(tmp_path).startswith(b"select")
        assert "cannot be read" in caplog.text

    def test_many_writers_at_once(self, compiler: Compiler, tmp_path: Path) -> None:
        start = threading.Barrier(8)
        results: list[bytes] = []

        def run() -> None:
            start.wait()
            results.append(load(tmp_path))

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(results)) == 1
        assert len(results) == 8
        assert len(list(tmp_path.iterdir())) == 1
        compiler.compiled.clear()
        assert load(tmp_path) == results[0]
        assert compiler.compiled == []


class TestPrebuilt:
    def put(self, folder: Path, architecture: str, code: bytes, *, source: str = "") -> None:
        recipe = describe("select", architecture, "another compiler")
        if source:
            recipe = nvrtc.Recipe("select", source, recipe.options, architecture, "")
        write_cubin(prebuilt_path(folder, "select", architecture), recipe, code)

    def test_comes_before_the_compiler(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse() -> str:
            raise AssertionError("no compiler is needed")

        monkeypatch.setattr(nvrtc, "compiler_version", refuse)
        self.put(tmp_path, "sm_90", b"code")
        assert load(None, prebuilt=(tmp_path / "none", tmp_path)) == b"code"

    def test_an_older_minor_of_the_same_major_runs_too(
        self, compiler: Compiler, tmp_path: Path
    ) -> None:
        for architecture in ("sm_75", "sm_80", "sm_86", "sm_90"):
            self.put(tmp_path, architecture, architecture.encode())

        def find(capability: tuple[int, int]) -> bytes:
            return load_cubin("select", capability, cache=None, prebuilt=(tmp_path,))

        assert find((8, 9)) == b"sm_86"
        assert find((8, 6)) == b"sm_86"
        assert find((8, 5)) == b"sm_80"
        assert compiler.compiled == []
        assert find((10, 0)).startswith(b"select for sm_100")

    def test_of_an_older_source_is_not_used(self, compiler: Compiler, tmp_path: Path) -> None:
        self.put(tmp_path, "sm_90", b"old", source="0" * 64)
        assert load(None, prebuilt=(tmp_path,)) == compiler("select", "sm_90")


def test_the_default_cache_follows_the_users_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.default_cache() == tmp_path / "solo-serve" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nvrtc.default_cache() == tmp_path / ".cache" / "solo-serve" / "kernels"


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="sources are incomplete"):
        nvrtc.read_source("select", tmp_path)


@needs_nvrtc
class TestNvrtc:
    """The real compiler; needs no GPU."""

    def test_its_version_is_one_that_drivers_of_13_0_load(self) -> None:
        assert compiler_version().startswith("13.0 ")

    def test_the_code_is_an_elf_that_is_stored_whole(self, tmp_path: Path) -> None:
        code = load_cubin("runs", (8, 0), cache=tmp_path, prebuilt=())
        assert code.startswith(b"\x7fELF")
        (path,) = tmp_path.iterdir()
        assert read_cubin(path, describe("runs", "sm_80", compiler_version())) == code

    def test_an_error_says_what_and_where(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "common.cuh").write_text("")
        (tmp_path / "broken.cu").write_text('extern "C" __global__ void k() { undefined(); }')
        with pytest.raises(BackendError, match=r"(?s)broken.cu for sm_80.*undefined"):
            compile_cubin("broken", "sm_80", tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_all_sources_compile_for_every_architecture(self, architecture: str) -> None:
        for name in SOURCES:
            assert compile_cubin(name, architecture).startswith(b"\x7fELF")
