from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from export import to_tensorrt
from export.errors import ExportError
from export.to_tensorrt import build_tensorrt
from service.engines.base import BackendOptions
from service.engines.tensorrt.engine import has_engine
from service.models.repository import read_config
from tests.support.blob_model import build_graph, publish
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_tensorrt import FakeTensorrt, build_error


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorrt:
    cuda = FakeCuda()
    fake = FakeTensorrt(cuda)
    modules = {"cuda": ModuleType("cuda"), "cuda.core": cuda.module, "tensorrt": fake.module}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(to_tensorrt, "find_obstacle", lambda: None)
    return fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish(tmp_path / "repo")


def test_the_engine_is_the_one_that_the_server_looks_for(fake: FakeTensorrt, folder: Path) -> None:
    said: list[str] = []
    file = build_tensorrt(folder, precision="fp32", say=said.append)
    assert file.parent == folder / "1" / "engines"
    assert has_engine(build_graph(), BackendOptions(), read_config(folder), file.parent)
    assert said[0] == "reading the graph, 0%"
    assert str(file) in said[-1]
    assert build_tensorrt(folder, precision="fp32", say=said.append) == file
    assert fake.builds == 1


def test_options_and_cache_reach_the_builder(
    fake: FakeTensorrt, folder: Path, tmp_path: Path
) -> None:
    file = build_tensorrt(
        folder,
        version=1,
        precision="fp32",
        cache=tmp_path / "cache",
        optimization_level=5,
        workspace_bytes=1 << 28,
        hardware_compatibility="ampere_plus",
    )
    assert file.parent == tmp_path / "cache"
    (config,) = fake.configs
    assert config.builder_optimization_level == 5
    assert config.limits == {"workspace": 1 << 28}
    assert config.hardware_compatibility_level == "ampere"


def test_a_precision_that_is_not_published_is_refused(fake: FakeTensorrt, folder: Path) -> None:
    for precision in ("fp16", "int8"):
        with pytest.raises(ExportError, match=rf"no graph of precision {precision} .*model\.onnx"):
            build_tensorrt(folder, precision=precision)


def test_another_graph_than_config_json_says_is_refused(fake: FakeTensorrt, folder: Path) -> None:
    (folder / "1" / "model.onnx").write_bytes(b"changed")
    with pytest.raises(ExportError, match=r"config\.json says"):
        build_tensorrt(folder, precision="fp32")
    (folder / "1" / "model.onnx").unlink()
    with pytest.raises(ExportError, match="No such file"):
        build_tensorrt(folder, precision="fp32")


def test_a_failed_build_is_told(fake: FakeTensorrt, folder: Path, tmp_path: Path) -> None:
    fake.errors = [build_error("head", "DeformConv", "no importer")]
    with pytest.raises(ExportError, match=r"node head \(DeformConv\): no importer"):
        build_tensorrt(folder, precision="fp32")
    fake.errors = []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match="not stored"):
        build_tensorrt(folder, precision="fp32", cache=tmp_path / "file" / "engines")


def test_wrong_values_are_refused(fake: FakeTensorrt, folder: Path) -> None:
    with pytest.raises(ExportError, match="optimization_level"):
        build_tensorrt(folder, precision="fp32", optimization_level=9)
    with pytest.raises(ExportError, match="no version 7"):
        build_tensorrt(folder, version=7)


def test_a_machine_without_tensorrt_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_tensorrt, "find_obstacle", lambda: "there is no GPU")
    with pytest.raises(ExportError, match="no TensorRT engine: there is no GPU"):
        build_tensorrt(folder)
