from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.model_config import Precision
from pipeline.repository_config import parse_model_config
from service.engines import choose, onnxruntime, openvino
from service.engines.base import Backend, BackendError, BackendOptions
from service.engines.slots import HostSlot, SlotBackend
from service.engines.trial import Candidate
from service.errors import DeviceError, ModelRefused
from tests.service.engines.test_choose import Version
from tests.support import fake_gpu
from tests.support.blob_model import build_graph

FREE = BackendOptions(threads=1, device="cpu", free_precision=True)
ORT, BF16 = "onnxruntime fp32", "openvino bf16"
INT8_FILE = {"model.int8.onnx": build_graph(poisonable=True)}


class Trials:
    """Stands in for the measurement; says what it was asked to measure."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.asked: list[dict[str, str]] = []

    def __call__(
        self, candidates: Sequence[Candidate], options: BackendOptions, config: Any
    ) -> dict[str, float]:
        self.asked.append({candidate.name: candidate.file for candidate in candidates})
        return {name.replace("_", " "): s for name, s in self.seconds.items()}


def set_trials(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> Trials:
    trials = Trials(**seconds)
    monkeypatch.setattr(choose, "measure_candidates", trials)
    return trials


def install_openvino(monkeypatch: pytest.MonkeyPatch, native: Precision | Exception) -> list[Any]:
    """Returns the log of what is built."""
    built: list[Any] = []

    def build(model: bytes, options: BackendOptions, config: Any) -> SlotBackend:
        built.append((options.precision, model))
        return SlotBackend(
            [HostSlot(lambda images, valid_hw: [])],
            name="openvino",
            device="cpu",
            precision=options.precision,
            reason="OpenVINO on the CPU",
        )

    def find_native() -> Precision:
        if isinstance(native, Exception):
            raise native
        return native

    monkeypatch.setattr(openvino, "is_installed", lambda: True)
    monkeypatch.setattr(openvino, "find_obstacle", lambda options: None)
    monkeypatch.setattr(openvino, "find_native_precision", find_native)
    monkeypatch.setattr(openvino, "build_openvino_backend", build)
    return built


def with_ap_cost(version: Version, **cost: float) -> Version:
    version.config = version.config.model_copy(update={"ap_cost": cost})
    return version


@pytest.fixture(autouse=True)
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)


def test_one_candidate_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = set_trials(monkeypatch)
    backend = with_ap_cost(Version(tmp_path, INT8_FILE), int8=0.0021, fp16=0.0).build(FREE)
    assert (backend.name, backend.precision, backend.canvas_s) == ("onnxruntime", "fp32", {})
    assert backend.reason == "CPU provider; device cpu was asked for"
    assert trials.asked == []


@pytest.mark.parametrize("engine", ["auto", "ort"])
def test_a_recorded_precision_is_a_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Any
) -> None:
    trials = set_trials(monkeypatch, onnxruntime_fp32=0.04, onnxruntime_int8=0.02)
    files = {**INT8_FILE, "model.bf16.onnx": b"not for this runtime"}
    version = with_ap_cost(Version(tmp_path, files), int8=0.002, fp32=0.0, bf16=0.0)
    backend = version.build(replace(FREE, engine=engine))
    assert (backend.name, backend.precision) == ("onnxruntime", "int8")
    assert trials.asked == [{ORT: "model.onnx", "onnxruntime int8": "model.int8.onnx"}]


def test_engines_are_timed_with_one_thread_and_serve_with_those_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BackendOptions] = []

    def build(model: bytes, options: BackendOptions, config: Any) -> SlotBackend:
        asked.append(options)
        slot = HostSlot(lambda images, valid_hw: [])
        return SlotBackend(
            [slot], name="onnxruntime", device="cpu", precision=options.precision, reason="CPU"
        )

    def measure(candidates: Sequence[Candidate], *_: Any) -> dict[str, float]:
        for candidate in candidates:
            candidate.build().close()
        return {ORT: 0.04, "onnxruntime int8": 0.02}

    monkeypatch.setattr(onnxruntime, "build_ort_backend", build)
    monkeypatch.setattr(choose, "measure_candidates", measure)
    version = with_ap_cost(Version(tmp_path, INT8_FILE), int8=0.0)
    wanted = replace(FREE, threads=3, slots=2, divide="tiles")
    version.build(wanted).close()
    timed = [(o.threads, o.slots, o.divide, o.precision) for o in asked[:2]]
    assert timed == [(1, 1, "none", "fp32"), (1, 1, "none", "int8")]
    assert asked[2:] == [replace(wanted, precision="int8")]


def test_the_fastest_is_taken_and_the_times_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = install_openvino(monkeypatch, "bf16")
    trials = set_trials(monkeypatch, onnxruntime_fp32=0.04, openvino_bf16=0.02)
    version = Version(tmp_path, {"model.exits.onnx": b"early exits"})
    backend = version.build(FREE)
    assert (backend.name, backend.precision) == ("openvino", "bf16")
    assert built == [("bf16", b"early exits")]
    assert trials.asked == [{ORT: "model.exits.onnx", BF16: "model.exits.onnx"}]
    assert backend.canvas_s == {ORT: 0.04, BF16: 0.02}
    assert backend.reason == (
        "OpenVINO on the CPU, early exits; the fastest of onnxruntime fp32, openvino bf16 on this "
        "machine; device cpu was asked for"
    )


def test_a_candidate_that_could_not_be_timed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_openvino(monkeypatch, "bf16")
    set_trials(monkeypatch, onnxruntime_fp32=0.04)
    backend = Version(tmp_path).build(FREE)
    assert backend.name == "onnxruntime"
    assert backend.reason.endswith("; not openvino bf16: it failed when it was timed")


@pytest.mark.parametrize("seconds", [0.05, 0.04, 0.039])
def test_a_tie_goes_to_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    install_openvino(monkeypatch, "bf16")
    set_trials(monkeypatch, onnxruntime_fp32=0.04, openvino_bf16=seconds)
    backend = Version(tmp_path).build(FREE)
    assert (backend.name, backend.canvas_s[BF16]) == ("onnxruntime", seconds)


def test_the_next_one_serves_where_the_fastest_fails_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_openvino(monkeypatch, "bf16")
    set_trials(monkeypatch, onnxruntime_fp32=0.04, openvino_bf16=0.02)

    def warm(backend: Backend) -> None:
        if backend.name == "openvino":
            raise RuntimeError("no memory")

    backend = Version(tmp_path).build(FREE, warm)
    assert backend.name == "onnxruntime"
    assert "not OpenVINO on the CPU: the first run failed: no memory" in backend.reason


def test_a_precision_that_is_known_to_cost_ap_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_openvino(monkeypatch, "bf16")
    trials = set_trials(monkeypatch, onnxruntime_fp32=0.04, openvino_fp32=0.02)
    backend = with_ap_cost(Version(tmp_path), bf16=0.003).build(FREE)
    assert (backend.name, backend.precision) == ("openvino", "fp32")
    assert list(trials.asked[0]) == [ORT, "openvino fp32"]
    assert backend.reason.endswith("not bf16: it costs 0.003 AP")


def test_a_library_that_cannot_be_loaded_leaves_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_openvino(monkeypatch, OSError("libtbb is missing"))
    set_trials(monkeypatch, onnxruntime_fp32=0.04)
    backend = Version(tmp_path).build(FREE)
    assert backend.name == "onnxruntime"
    assert "libtbb is missing" in backend.reason


def test_the_models_own_files_are_refused_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_openvino(monkeypatch, "bf16")
    version = Version(tmp_path)
    (version.folder / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ModelRefused, match=r"config\.json says"):
        version.build(replace(FREE, cache=tmp_path / "cache"))


@pytest.mark.parametrize("is_installed", [True, False])
def test_openvino_that_is_asked_for_is_taken_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_installed: bool
) -> None:
    trials = set_trials(monkeypatch)
    wanted = replace(FREE, engine="openvino")
    if is_installed:
        install_openvino(monkeypatch, "bf16")
        backend = Version(tmp_path).build(wanted)
        assert (backend.name, backend.precision) == ("openvino", "bf16")
    else:
        with pytest.raises(BackendError, match="OpenVINO on the CPU: it is not installed"):
            Version(tmp_path).build(wanted)
    assert trials.asked == []


@pytest.mark.parametrize("engine", ["trt", "aoti"])
def test_an_engine_for_gpus_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Any
) -> None:
    install_openvino(monkeypatch, "bf16")
    trials = set_trials(monkeypatch, onnxruntime_fp32=0.04, openvino_bf16=0.02)
    with pytest.raises(BackendError, match=f"engine {engine}, device cpu"):
        Version(tmp_path).build(replace(FREE, engine=engine))
    assert trials.asked == []


@pytest.mark.parametrize(("device", "expected"), [("auto", "cpu"), ("cuda", None)])
def test_openvino_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any, expected: str | None
) -> None:
    fake_gpu.install(monkeypatch)
    find_obstacle = openvino.find_obstacle
    install_openvino(monkeypatch, "bf16")
    monkeypatch.setattr(openvino, "find_obstacle", find_obstacle)
    monkeypatch.setattr(openvino, "_list_capabilities", lambda: frozenset({"BF16"}))
    wanted = replace(FREE, engine="openvino", device=device)
    if expected is None:
        with pytest.raises(DeviceError, match="OpenVINO on CUDA: it runs on the CPU"):
            Version(tmp_path).build(wanted)
    else:
        backend = Version(tmp_path).build(wanted)
        assert (backend.name, backend.device) == ("openvino", expected)


@pytest.mark.parametrize("engine", ["auto", "openvino"])
def test_a_precision_that_is_asked_for_needs_no_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Any
) -> None:
    built = install_openvino(monkeypatch, "bf16")
    wanted = BackendOptions(threads=1, device="cpu", engine=engine, precision="bf16")
    assert Version(tmp_path).build(wanted).name == "openvino"
    assert built == [("bf16", build_graph())]


def test_fp32_that_is_asked_for_stays_with_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_openvino(monkeypatch, "bf16")
    trials = set_trials(monkeypatch, onnxruntime_fp32=0.04, openvino_bf16=0.02)
    backend = Version(tmp_path).build(replace(FREE, free_precision=False))
    assert (backend.name, backend.precision, trials.asked) == ("onnxruntime", "fp32", [])


def test_a_gpu_goes_before_what_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    install_openvino(monkeypatch, "bf16")
    trials = set_trials(monkeypatch, onnxruntime_fp32=0.04, openvino_bf16=0.02)
    backend = Version(tmp_path).build(replace(FREE, device="auto"))
    assert (backend.device, backend.precision, trials.asked) == ("cuda", "fp32", [])


@pytest.mark.parametrize("cost", ["0.5 AP", None, 1.5, -2])
def test_a_cost_that_is_no_ap_is_refused(tmp_path: Path, cost: Any) -> None:
    content = json.loads((Version(tmp_path).config).model_dump_json())
    kept = {k: v for k, v in content.items() if k not in ("name", "version")}
    with pytest.raises(Exception, match="ap_cost"):
        parse_model_config(
            json.dumps({"name": "blobs", "versions": {"1": {**kept, "ap_cost": {"bf16": cost}}}})
        ).for_version(1)
