"""The engines that solo-export makes: which functions are called with what, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export import __main__ as command
from export import engines
from export.engines import build_kernels, make_packages, parse_package
from export.errors import ExportError
from export.to_aoti import AotiArtefact, AotiOptions
from pipeline.model_config import ModelConfig
from pipeline.repository_config import parse_model_config
from service.engines.base import BackendError
from service.engines.kernels.nvrtc import ARCHITECTURES, PREBUILT
from tests.support.tiny_solo import tiny_config, tiny_network
from training.configs.schema import Config

ROOT = Path(__file__).resolve().parents[2]
MODEL: ModelConfig = parse_model_config(
    (ROOT / "model_repo" / "nuclei" / "config.json").read_bytes()
).for_version(4)


@pytest.mark.parametrize("text", ["cpu", "cpu:", ":fp32", "gpu:fp32", "cpu:int8", "cpu:fp32:x"])
def test_what_is_no_package_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_package(text)


def test_kernels_are_built_where_the_service_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, tuple[str, ...]]] = []

    def record(folder: Path, architectures: tuple[str, ...]) -> list[Path]:
        calls.append((folder, architectures))
        return [folder / "a"]

    monkeypatch.setattr(engines, "prebuild", record)
    said: list[str] = []
    assert build_kernels(["sm_90"], said.append) == [PREBUILT / "a"]
    build_kernels([], said.append)
    assert calls == [(PREBUILT, ("sm_90",)), (PREBUILT, ARCHITECTURES)]
    assert "sm_90" in said[0]


def test_a_compiler_that_refuses_is_an_export_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> list[Path]:
        raise BackendError("NVRTC knows no sm_1")

    monkeypatch.setattr(engines, "prebuild", refuse)
    with pytest.raises(ExportError, match="knows no sm_1"):
        build_kernels(["sm_1"], print)
    assert command.main(["--kernels", "sm_1"]) == 1
    assert "knows no sm_1" in capsys.readouterr().err


def test_packages_are_compiled_for_the_models_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[AotiOptions, str | None]] = []

    def compile_package(
        network: object, config: Config, options: AotiOptions, *, onnx_sha256: str | None
    ) -> AotiArtefact:
        seen.append((options, onnx_sha256))
        return AotiArtefact("model.cpu.fp32.pt2", b"code", "parity.cpu.fp32.json", {"passed": True})

    monkeypatch.setattr(engines, "export_aoti", compile_package)
    config = tiny_config()
    network = tiny_network(config)
    (artefact,) = make_packages(network, config, MODEL, [parse_package("cpu:fp32")], print)
    assert (artefact.name, artefact.data) == ("model.cpu.fp32.pt2", b"code")
    ((options, digest),) = seen
    assert options.max_batch == MODEL.limits.max_batch
    assert digest == MODEL.files["model.onnx"].sha256


def test_engines_are_built_of_the_version_that_was_published(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Path, dict[str, Any]]] = []

    def build(folder: Path, **options: Any) -> Path:
        calls.append((folder, options))
        return folder / "engine.plan"

    monkeypatch.setattr(engines, "build_tensorrt", build)
    assert command.main(["--variants-of", "repo/nuclei/7", "--tensorrt", "fp16", "fp32"]) == 0
    assert [(folder, call["version"], call["precision"]) for folder, call in calls] == [
        (Path("repo/nuclei"), 7, "fp16"),
        (Path("repo/nuclei"), 7, "fp32"),
    ]
    assert "engine.plan" in capsys.readouterr().out


def test_tensorrt_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "model_repo" / "nuclei" / "4"
    assert command.main(["--variants-of", str(folder), "--tensorrt", "fp32"]) == 1
    assert "TensorRT" in capsys.readouterr().err
