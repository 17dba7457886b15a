from __future__ import annotations

import ctypes
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pipeline.model_config import ModelConfig, parse_model_config
from pipeline.types import Candidates, Tile, Window
from service.engines import onnxruntime as ort_backend
from service.engines.base import BackendError, BackendOptions
from service.engines.onnxruntime import (
    build_ort_backend,
    build_ort_tensorrt_backend,
    find_obstacle,
    find_tensorrt_obstacle,
)
from service.errors import DeviceError
from tests.support import fake_gpu
from tests.support.blob_model import (
    KEEP_RATIO_INPUT,
    build_graph,
    build_typed_graph,
    model_config,
)
from tests.support.slow_model import FOR_EVER, build_slow_graph

PROVIDERS = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
CPU = BackendOptions(device="cpu", threads=1)


def build_batch(batch: int, height: int, width: int, seed: int = 1) -> list[Tile]:
    images = np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)
    return [Tile(image, (height, width), Window(0, 0, height, width)) for image in images]


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (3, 64, 96), (2, 32, 128)])
def test_batches_and_canvases_of_any_size(batch: int, height: int, width: int) -> None:
    backend = build_ort_backend(build_graph(), CPU)
    found = backend.infer(build_batch(batch, height, width))
    assert len(found) == batch
    for candidates in found:
        assert candidates.mask_hw == (height // 4, width // 4)
        assert (np.diff(candidates.scores) <= 0).all()


@pytest.mark.parametrize(
    ("of_model", "changes", "expected"),
    [
        ({}, {}, (3, 1)),
        ({}, {"divide": "none"}, (1, 3)),
        ({}, {"slots": 2}, (2, 3)),
        ({"input": KEEP_RATIO_INPUT}, {}, (1, 3)),
        ({"input": KEEP_RATIO_INPUT}, {"divide": "all"}, (3, 1)),
    ],
    ids=["tiles", "one caller", "as told", "whole images", "whole images, all divided"],
)
def test_tiles_are_shared_by_calls_and_whole_images_by_threads(
    monkeypatch: pytest.MonkeyPatch,
    of_model: dict[str, Any],
    changes: dict[str, Any],
    expected: tuple[int, int],
) -> None:
    built: list[BackendOptions] = []
    build_session = ort_backend._build_session

    def watch(model: Any, options: BackendOptions, providers: Any) -> Any:
        built.append(options)
        return build_session(model, options, providers)

    monkeypatch.setattr(ort_backend, "_build_session", watch)
    options = replace(BackendOptions(device="cpu", threads=3, divide="tiles"), **changes)
    backend = build_ort_backend(build_graph(), options, read_config(**of_model))
    assert (backend.concurrency, built[0].threads) == expected


def test_a_call_that_never_ends_is_interrupted() -> None:
    backend = build_ort_backend(build_slow_graph(rounds=FOR_EVER), CPU)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(backend.infer, build_batch(1, 64, 64))
        with pytest.raises(TimeoutError):
            call.result(0.5)
        backend.interrupt()
        with pytest.raises(Exception, match="terminate flag"):
            call.result(20)


def test_a_batch_is_what_its_canvases_are_alone() -> None:
    backend = build_ort_backend(build_graph(), CPU)
    tiles = build_batch(4, 64, 64)
    for tile, candidates in zip(tiles, backend.infer(tiles), strict=True):
        (alone,) = backend.infer([tile])
        np.testing.assert_allclose(candidates.scores, alone.scores, rtol=1e-6)
        assert isinstance(candidates, Candidates) and isinstance(alone, Candidates)
        np.testing.assert_allclose(candidates.mask_probs, alone.mask_probs, rtol=1e-6)


def test_a_graph_is_read_from_a_path_too(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(build_graph())
    assert build_ort_backend(file, CPU).device == "cpu"


def test_a_closed_engine_says_so() -> None:
    backend = build_ort_backend(build_graph(), CPU)
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.infer(build_batch(1, 64, 64))


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(BackendError, match="cannot load the graph"):
        build_ort_backend(b"no graph", CPU)


def test_several_calls_at_once_share_the_session() -> None:
    backend = build_ort_backend(build_graph(), replace(CPU, slots=3))
    assert backend.concurrency == 3
    batches = [build_batch(2, 64, 64, seed) for seed in range(6)]
    alone = [backend.infer(batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for one, other in zip(pool.map(backend.infer, batches), alone, strict=True):
            assert [c.scores.tolist() for c in one] == [c.scores.tolist() for c in other]


def test_masks_in_float16_are_cast_and_bfloat16_is_refused() -> None:
    tiles = build_batch(2, 64, 64)
    wanted = build_ort_backend(build_graph(), CPU).infer(tiles)
    half = replace(CPU, precision="fp16")
    backend = build_ort_backend(build_typed_graph(onnx.TensorProto.FLOAT16), half)
    assert backend.precision == "fp16"
    for found, full in zip(backend.infer(tiles), wanted, strict=True):
        assert isinstance(found, Candidates) and isinstance(full, Candidates)
        assert found.mask_probs.dtype == np.float32
        np.testing.assert_allclose(found.mask_probs, full.mask_probs, atol=1e-3)
    with pytest.raises(BackendError, match="no bfloat16 on the CPU"):
        build_ort_backend(build_typed_graph(onnx.TensorProto.BFLOAT16), CPU)


def test_cuda_that_the_runtime_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "has no CUDA" in str(find_obstacle(BackendOptions(device="cuda")))
    assert find_obstacle(BackendOptions(device="auto")) is None
    assert find_obstacle(BackendOptions(device="cpu")) is None
    with pytest.raises(DeviceError, match="has no CUDA"):
        build_ort_backend(build_graph(), BackendOptions(device="cuda", threads=1))


def test_cuda_that_falls_back_in_silence_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A runtime that offers CUDA but gives a CPU session, as with missing libraries."""
    session = fake_gpu.install(monkeypatch)
    monkeypatch.setattr(session, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match="cannot use its CUDAExecutionProvider here"):
        build_ort_backend(build_graph(), BackendOptions(device="cuda", threads=1))
    assert "device auto takes the CPU" not in caplog.text
    monkeypatch.setattr(
        session, "get_providers", lambda self: [name for name in self._providers if "CPU" in name]
    )
    backend = build_ort_backend(build_graph(), BackendOptions(threads=1))
    assert backend.device == "cpu"
    assert "cannot use its CUDAExecutionProvider" in backend.reason
    assert "device auto takes the CPU" in caplog.text


def test_an_int8_graph_is_not_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    assert find_obstacle(BackendOptions(device="cuda", precision="int8")) == (
        "int8 graphs are made for the CPU"
    )


def read_config(**changes: Any) -> ModelConfig:
    content = {**model_config(build_graph()), **changes}
    return parse_model_config(json.dumps(content)).for_version(1)


CUDA = BackendOptions(device="cuda", threads=1)


def test_one_canvas_on_cuda_has_graphs_a_stream_and_outputs_that_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = fake_gpu.install(monkeypatch)
    config = read_config()
    tiles = build_batch(3, 128, 128)
    wanted = build_ort_backend(build_graph(), CPU).infer(tiles)
    session.asked.clear()
    backend = build_ort_backend(build_graph(), CUDA, config)
    assert (backend.device, backend.concurrency) == ("cuda", 2)
    assert backend.reason == "CUDA provider, post-processing on the GPU, CUDA graphs"
    assert [providers[0] for providers in session.asked] == 2 * [
        (
            "CUDAExecutionProvider",
            {
                "device_id": "0",
                "arena_extend_strategy": "kSameAsRequested",
                "cudnn_conv_algo_search": "EXHAUSTIVE",
                "use_tf32": "0",
                "user_compute_stream": "4711",
                "enable_cuda_graph": "1",
            },
        )
    ]
    for found, plain in zip(backend.infer(tiles), wanted, strict=True):
        assert found.scores.tolist() == plain.scores.tolist()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.infer(tiles)


def test_a_graph_that_cannot_be_captured_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = fake_gpu.install(monkeypatch)
    session.refuse_graphs = True
    backend = build_ort_backend(build_graph(), CUDA, read_config())
    assert backend.reason == "CUDA provider, post-processing on the GPU"
    assert "no CUDA graphs" in caplog.text
    assert len(backend.infer(build_batch(2, 128, 128))) == 2


def test_memory_that_the_gpu_does_not_have_is_a_device_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full(fake_gpu.HostMemory):
        def allocate(self, n_bytes: int) -> Any:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")

    fake_gpu.install(monkeypatch)
    monkeypatch.setattr("service.engines.onnxruntime.CudaMemory", Full)
    with pytest.raises(DeviceError, match="device cuda: CUDA_ERROR_OUT_OF_MEMORY"):
        build_ort_backend(build_graph(), CUDA, read_config())
    assert build_ort_backend(build_graph(), replace(CUDA, device="auto"), read_config()).device == (
        "cpu"
    )


def test_many_canvases_on_cuda_are_neither_searched_nor_padded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = fake_gpu.install(monkeypatch)
    config = read_config(input=KEEP_RATIO_INPUT)
    backend = build_ort_backend(build_graph(), replace(CUDA, slots=1), config)
    options = session.asked[0][0][1]
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert "enable_cuda_graph" not in options
    for canvas_hw in ((64, 96), (128, 64)):
        assert len(backend.infer(build_batch(3, *canvas_hw))) == 3


def test_without_kernels_outputs_are_copied_and_the_reason_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = fake_gpu.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "service.engines.kernels.postprocessor", None)
    backend = build_ort_backend(build_graph(), CUDA, read_config())
    assert "outputs are copied to the host: the CUDA kernels cannot be loaded" in backend.reason
    assert "user_compute_stream" not in session.asked[0][0][1]
    assert backend.concurrency == 2
    assert len(backend.infer(build_batch(3, 128, 128))) == 3
    with pytest.raises(BackendError, match="bfloat16 masks cannot be copied"):
        build_ort_backend(build_typed_graph(onnx.TensorProto.BFLOAT16), CUDA, read_config())


def test_the_tensorrt_provider_needs_its_library_and_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    assert "has no TensorRT provider" in str(find_tensorrt_obstacle(CUDA))
    monkeypatch.setattr(ort, "get_available_providers", lambda: PROVIDERS)
    assert "serves fp32 only, not fp16" in str(
        find_tensorrt_obstacle(replace(CUDA, precision="fp16"))
    )
    monkeypatch.setattr(ort_backend, "_NVINFER", "libmissing.so.10")
    assert "libmissing.so.10" in str(find_tensorrt_obstacle(CUDA))


def test_the_tensorrt_provider_keeps_engines_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = fake_gpu.install(monkeypatch)
    monkeypatch.setattr(ort, "get_available_providers", lambda: PROVIDERS)
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name: SimpleNamespace(getInferLibVersion=lambda: 101600)
    )
    options = replace(CUDA, slots=1)
    for max_batch in (8, 4, 8):
        config = read_config(limits={"max_batch": max_batch})
        backend = build_ort_tensorrt_backend(build_graph(), options, config, tmp_path)
        assert backend.reason == "TensorRT provider, post-processing on the GPU"
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"engine cache .*file/.* cannot be made"):
        build_ort_tensorrt_backend(build_graph(), options, config, tmp_path / "file")
    name, chosen = session.asked[0][0]
    assert name == "TensorrtExecutionProvider"
    assert Path(chosen["trt_engine_cache_path"]).parent == tmp_path
    assert chosen["trt_profile_opt_shapes"] == "images:8x128x128x3,valid_hw:8x2"
    assert chosen["user_compute_stream"] == session.asked[0][1][1]["user_compute_stream"]
