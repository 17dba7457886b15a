from __future__ import annotations

import hashlib
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest

from pipeline.model_config import ModelConfig
from pipeline.repository_config import parse_model_config
from service.engines import choose
from service.engines.artefacts import Artefacts
from service.engines.base import Backend, BackendError, BackendOptions
from service.engines.builder import Upgrade
from service.engines.choose import Warm, build_backend, check_device, exits_file
from service.engines.slots import HostSlot, SlotBackend
from service.errors import DeviceError, ModelRefused
from tests.support import fake_gpu
from tests.support.blob_model import build_graph, model_config

AUTO = BackendOptions(threads=1)


class Version:
    """A version's folder with files of any content, listed in its config.json."""

    def __init__(self, root: Path, files: dict[str, bytes] | None = None) -> None:
        self.folder = root / "model_repo" / "blobs" / "1"
        self.folder.mkdir(parents=True)
        content = model_config(build_graph())
        listed = content["versions"]["1"]["files"]
        for name, data in {"model.onnx": build_graph(), **(files or {})}.items():
            (self.folder / name).write_bytes(data)
            listed[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        self.config: ModelConfig = parse_model_config(json.dumps(content)).for_version(1)
        self.warmed: list[Any] = []

    def build(self, options: BackendOptions = AUTO, warm: Warm | None = None) -> SlotBackend:
        artefacts = Artefacts(self.folder, self.config.files)
        return build_backend(artefacts, options, self.config, warm or self.warmed.append)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnxruntime", "choose"):
        monkeypatch.setattr(
            f"service.engines.{module}.find_gpu", lambda ordinals=(0,): "there is no driver"
        )


def engine(name: str) -> SlotBackend:
    return SlotBackend(
        [HostSlot(lambda images, valid_hw: [])],
        name=name,
        device="cuda",
        precision="fp32",
        reason=f"{name} works",
    )


def install_engines(
    monkeypatch: pytest.MonkeyPatch,
    *,
    trt: str | None = "TensorRT is not installed",
    aoti: str | None = "torch is not installed",
    cached: bool = False,
) -> list[tuple[Any, ...]]:
    """Modules of both engines with the obstacles given; returns the log of what they built."""
    log: list[tuple[Any, ...]] = []

    def build_trt(model: bytes, options: Any, config: Any, cache: Path) -> Any:
        log.append(("trt", cache))
        return engine("tensorrt")

    def plan_upgrade(model: bytes, options: Any, config: Any, cache: Path) -> Upgrade:
        log.append(("upgrade", options.precision, cache))
        return Upgrade(lambda report: None, lambda: engine("tensorrt"))

    def build_aoti(package: Path, options: Any, config: Any) -> Any:
        log.append(("aoti", package.name, options.device))
        if package.read_bytes() == b"broken":
            raise BackendError("torch cannot load the package")
        return engine("aotinductor")

    modules: dict[str, dict[str, Any]] = {
        "trt": {
            "find_obstacle": lambda options: trt,
            "has_engine": lambda model, options, config, cache: cached,
            "build_trt_backend": build_trt,
            "plan_upgrade": plan_upgrade,
        },
        "trt_cache": {
            "choose_cache": lambda folder, wanted: SimpleNamespace(
                folder=wanted or folder / "engines"
            )
        },
        "aoti": {"find_obstacle": lambda options: aoti, "build_aoti_backend": build_aoti},
    }
    for name, content in modules.items():
        module = ModuleType(choose._MODULES[name])
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return log


def hide_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the modules were not part of the installation."""
    load = importlib.import_module

    def import_module(name: str) -> Any:
        if name in (choose._MODULES[kind] for kind in ("trt", "trt_cache", "aoti")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(name)

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.usefixtures("no_gpu")
class TestWithoutGpu:
    def test_auto_takes_the_cpu_and_says_why(self, tmp_path: Path) -> None:
        backend = Version(tmp_path).build()
        assert (backend.name, backend.device, backend.precision) == ("onnxruntime", "cpu", "fp32")
        assert backend.reason == "CPU provider; not CUDA: there is no driver"

    def test_what_was_asked_for_is_the_reason(self, tmp_path: Path) -> None:
        options = replace(AUTO, device="cpu", engine="ort", slots=2)
        backend = Version(tmp_path).build(options)
        assert backend.reason == "CPU provider; engine ort was asked for; device cpu was asked for"
        assert backend.concurrency == 2

    def test_the_file_of_the_precision_is_taken(self, tmp_path: Path) -> None:
        version = Version(tmp_path, {"model.int8.onnx": build_graph(poisonable=True)})
        (version.folder / "model.onnx").write_bytes(b"damaged, but not needed")
        assert version.build(replace(AUTO, precision="int8")).precision == "int8"

    @pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
    def test_fp32_replaces_a_precision_that_the_version_lacks(
        self, tmp_path: Path, precision: Literal["fp16", "bf16", "int8"]
    ) -> None:
        options = replace(AUTO, device="cpu", precision=precision, precision_fallback=True)
        backend = Version(tmp_path).build(options)
        assert backend.precision == "fp32"
        assert backend.reason == (
            f"CPU provider; device cpu was asked for; precision {precision} was asked for; "
            f"not ONNX Runtime on the CPU: the version has no model.{precision}.onnx"
        )

    def test_fp32_replaces_a_precision_that_does_not_run(self, tmp_path: Path) -> None:
        options = replace(AUTO, precision="int8", precision_fallback=True)
        backend = Version(tmp_path, {"model.int8.onnx": b"no graph"}).build(options)
        assert backend.precision == "fp32"
        assert "cannot load the graph" in backend.reason

    def test_a_precision_that_is_there_is_not_replaced(self, tmp_path: Path) -> None:
        options = replace(AUTO, device="cpu", precision="int8", precision_fallback=True)
        backend = Version(tmp_path, {"model.int8.onnx": build_graph()}).build(options)
        assert backend.precision == "int8"
        assert backend.reason == "CPU provider; device cpu was asked for"

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_half_precision_is_for_gpus(
        self, tmp_path: Path, precision: Literal["fp16", "bf16"]
    ) -> None:
        """The CPU computes it in float32; it is taken only where the CPU is asked for by name."""
        version = Version(tmp_path, {f"model.{precision}.onnx": build_graph()})
        options = replace(AUTO, precision=precision, precision_fallback=True)
        assert version.build(options).precision == "fp32"
        assert version.build(replace(options, device="cpu")).precision == precision
        assert version.build(replace(options, precision_fallback=False)).precision == precision

    def test_a_damaged_file_is_refused_not_replaced(self, tmp_path: Path) -> None:
        version = Version(tmp_path, {"model.int8.onnx": build_graph()})
        (version.folder / "model.int8.onnx").write_bytes(b"damaged")
        with pytest.raises(ModelRefused, match="truncated or modified"):
            version.build(replace(AUTO, precision="int8", precision_fallback=True))

    def test_without_fallback_nothing_is_replaced(self, tmp_path: Path) -> None:
        with pytest.raises(ModelRefused, match="precision int8 was asked for"):
            Version(tmp_path).build(replace(AUTO, precision="int8"))

    def test_the_reason_that_fp32_fails_is_given_after_the_fallback(self, tmp_path: Path) -> None:
        def fail(backend: Backend) -> None:
            raise BackendError("the masks are wrong")

        options = replace(AUTO, precision="int8", precision_fallback=True)
        with pytest.raises(BackendError, match=r"no model\.int8\.onnx.*the masks are wrong"):
            Version(tmp_path).build(options, fail)

    @pytest.mark.parametrize("error", [RuntimeError("odd"), MemoryError(), RecursionError("deep")])
    def test_an_engine_that_raises_anything_is_not_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def fail(*arguments: Any) -> SlotBackend:
            raise error

        monkeypatch.setattr("service.engines.onnxruntime.build_ort_backend", fail)
        with pytest.raises(BackendError, match=type(error).__name__):
            Version(tmp_path).build()

    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    def test_the_graph_with_early_exits_is_taken(
        self, tmp_path: Path, precision: Literal["fp32", "int8"]
    ) -> None:
        files = {"model.int8.onnx": b"not needed", exits_file(precision): build_graph()}
        version = Version(tmp_path, files)
        (version.folder / "model.onnx").write_bytes(b"damaged, but not needed")
        backend = version.build(replace(AUTO, precision=precision))
        assert backend.precision == precision
        assert backend.reason == "CPU provider, early exits; not CUDA: there is no driver"

    def test_a_damaged_graph_with_early_exits_is_refused(self, tmp_path: Path) -> None:
        version = Version(tmp_path, {"model.exits.onnx": build_graph()})
        (version.folder / "model.exits.onnx").write_bytes(b"damaged")
        with pytest.raises(ModelRefused, match=r"config\.json says") as caught:
            version.build()
        assert caught.value.file == version.folder / "model.exits.onnx"

    def test_a_precision_without_a_file_names_it_and_the_command(self, tmp_path: Path) -> None:
        version = Version(tmp_path)
        with pytest.raises(ModelRefused) as caught:
            version.build(replace(AUTO, precision="int8"))
        assert caught.value.file == version.folder / "model.int8.onnx"
        repo = version.folder.parent.parent
        command = f"solo-export CHECKPOINT --out {repo} --precision int8"
        assert command in str(caught.value)
        assert "['model.onnx']" in str(caught.value)

    def test_cuda_is_refused_before_anything_is_read(self, tmp_path: Path) -> None:
        options = replace(AUTO, device="cuda")
        with pytest.raises(DeviceError, match="device cuda: there is no driver"):
            check_device(options)
        version = Version(tmp_path)
        (version.folder / "model.onnx").unlink()
        with pytest.raises(DeviceError, match="device cuda: there is no driver"):
            version.build(options)
        check_device(AUTO)

    @pytest.mark.parametrize("device", ["auto", "cpu"])
    def test_tensorrt_needs_a_gpu(self, tmp_path: Path, device: Any) -> None:
        with pytest.raises(BackendError, match=rf"engine trt, device {device}.*: CUDA: .*"):
            Version(tmp_path).build(replace(AUTO, engine="trt", device=device))

    def test_a_package_for_the_cpu_must_be_asked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = install_engines(monkeypatch, aoti=None)
        version = Version(tmp_path, {"model.cpu.fp32.pt2": b"package"})
        assert version.build().name == "onnxruntime"
        assert version.build(replace(AUTO, engine="aoti")).name == "aotinductor"
        assert log == [("aoti", "model.cpu.fp32.pt2", "cpu")]

    def test_a_package_that_is_not_there_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install_engines(monkeypatch, aoti=None)
        with pytest.raises(
            BackendError, match=r"on the CPU: the version has no model.cpu.fp32.pt2"
        ):
            Version(tmp_path).build(replace(AUTO, engine="aoti"))

    def test_an_engine_that_is_not_installed_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hide_engines(monkeypatch)
        with pytest.raises(BackendError, match="AOTInductor on the CPU: it is not part of this"):
            Version(tmp_path).build(replace(AUTO, engine="aoti"))

    def test_a_graph_that_is_none_is_refused_with_the_runtimes_reason(self, tmp_path: Path) -> None:
        version = Version(tmp_path, {"model.onnx": b"surely no graph"})
        with pytest.raises(BackendError, match="the CPU: ONNX Runtime cannot load the graph"):
            version.build()


class TestWithGpu:
    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_gpu.install(monkeypatch)

    def test_onnx_runtime_is_last_and_says_why_the_others_are_not_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install_engines(monkeypatch, aoti=None)
        backend = Version(tmp_path).build()
        assert (backend.name, backend.device) == ("onnxruntime", "cuda")
        assert backend.reason == (
            "CUDA provider, post-processing on the GPU, CUDA graphs; "
            "not TensorRT on CUDA: TensorRT is not installed; "
            "not AOTInductor on CUDA: the version has no model.sm_90.fp32.pt2"
        )

    def test_a_fitting_package_goes_before_onnx_runtime(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = install_engines(monkeypatch, aoti=None)
        files = {"model.sm_90.bf16.pt2": b"package", "model.sm_80.bf16.pt2": b"other"}
        backend = Version(tmp_path, files).build(replace(AUTO, precision="bf16"))
        assert backend.name == "aotinductor"
        assert log == [("aoti", "model.sm_90.bf16.pt2", "cuda")]

    def test_a_better_engine_that_breaks_is_left_with_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        install_engines(monkeypatch, aoti=None)
        backend = Version(tmp_path, {"model.sm_90.fp32.pt2": b"broken"}).build()
        assert backend.name == "onnxruntime"
        assert "AOTInductor on CUDA is not taken: torch cannot load the package" in caplog.text
        assert "not AOTInductor on CUDA: torch cannot load the package" in backend.reason

    def test_an_engine_whose_first_run_fails_is_closed_and_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install_engines(monkeypatch)
        version, closed = Version(tmp_path), list[str]()
        close = SlotBackend.close

        def warm(backend: Backend) -> None:
            if backend.device == "cuda":
                raise RuntimeError("libcudnn_ops.so.9 is missing")

        def close_and_tell(self: SlotBackend) -> None:
            closed.append(self.device)
            close(self)

        monkeypatch.setattr(SlotBackend, "close", close_and_tell)
        backend = version.build(warm=warm)
        assert (backend.device, closed) == ("cpu", ["cuda"])
        assert "CUDA: the first run failed: libcudnn_ops.so.9 is missing" in backend.reason
        with pytest.raises(BackendError, match=r"the first run failed: libcudnn_ops"):
            version.build(replace(AUTO, device="cuda"), warm=warm)

    def test_onnx_runtime_serves_while_tensorrt_is_built(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = install_engines(monkeypatch, trt=None)
        version = Version(tmp_path)
        backend = version.build()
        assert (backend.name, backend.device) == ("onnxruntime", "cuda")
        assert log == [("upgrade", "fp32", version.folder / "engines")]
        assert version.warmed == [backend]
        assert backend.upgrade is not None
        assert backend.upgrade.load().name == "tensorrt"

    def test_a_built_engine_is_loaded_from_the_cache_that_is_set(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = install_engines(monkeypatch, trt=None, cached=True)
        cache = tmp_path / "cache"
        backend = Version(tmp_path).build(replace(AUTO, cache=cache, device="cuda"))
        assert backend.reason == "tensorrt works; device cuda was asked for"
        assert backend.upgrade is None
        assert log == [("trt", cache)]

    def test_tensorrt_that_is_asked_for_is_not_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install_engines(monkeypatch)
        text = "TensorRT on CUDA: TensorRT is not installed$"
        with pytest.raises(BackendError, match=text):
            Version(tmp_path).build(replace(AUTO, engine="trt"))
        with pytest.raises(DeviceError, match=text):
            Version(tmp_path / "other").build(replace(AUTO, engine="trt", device="cuda"))

    def test_cuda_that_onnx_runtime_lacks_is_a_device_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hide_engines(monkeypatch)
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
        with pytest.raises(DeviceError, match=r"on CUDA: this ONNX Runtime .* has no"):
            Version(tmp_path).build(replace(AUTO, device="cuda"))
        assert Version(tmp_path / "other").build().device == "cpu"

    def test_an_int8_graph_goes_to_the_cpu(self, tmp_path: Path) -> None:
        version = Version(tmp_path, {"model.int8.onnx": build_graph()})
        backend = version.build(replace(AUTO, precision="int8"))
        assert backend.device == "cpu"
        assert "not ONNX Runtime on CUDA: int8 graphs are made for the CPU" in backend.reason


def test_a_module_that_cannot_import_something_else_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'numpy.gone'", name="numpy.gone")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match=r"numpy\.gone"):
        Version(tmp_path).build(replace(AUTO, device="cpu"))
