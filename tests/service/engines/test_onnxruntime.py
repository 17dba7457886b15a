from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pipeline.types import Candidates, Tile, Window
from service.engines import onnxruntime as ort_backend
from service.engines.base import BackendError, BackendOptions
from service.engines.onnxruntime import build_ort_backend, find_obstacle
from service.engines.ort_session import build_cuda_session, build_session
from service.errors import DeviceError
from tests.service.engines.test_ort_session import read_config
from tests.support import fake_gpu
from tests.support.blob_model import (
    KEEP_RATIO_INPUT,
    POISON,
    build_graph,
    build_typed_graph,
)
from tests.support.slow_model import FOR_EVER, build_slow_graph

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

    def watch(model: Any, options: BackendOptions, providers: Any) -> Any:
        built.append(options)
        return build_session(model, options, providers)

    monkeypatch.setattr(ort_backend, "build_session", watch)
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


CUDA = BackendOptions(device="cuda", threads=1)


def assert_same(found: Sequence[Any], wanted: Sequence[Any], tolerance: float = 1e-6) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert isinstance(one, Candidates)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-6)
        assert one.labels.tolist() == other.labels.tolist()
        np.testing.assert_allclose(one.mask_probs, other.mask_probs, atol=tolerance)


def test_few_canvases_on_cuda_has_graphs_a_stream_and_outputs_that_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = fake_gpu.install(monkeypatch)
    tiles = build_batch(3, 128, 128)
    wanted = build_ort_backend(build_graph(), CPU).infer(tiles)
    session.asked.clear()
    backend = build_ort_backend(build_graph(), CUDA, read_config())
    assert (backend.device, backend.concurrency) == ("cuda", 2)
    assert backend.reason == "CUDA provider, post-processing on the GPU, CUDA graphs"
    streams = [providers[0][1].pop("user_compute_stream") for providers in session.asked]
    assert len(set(streams)) == 2 and {int(s) for s in streams} <= session.cuda.open_streams
    assert [providers[0] for providers in session.asked] == 2 * [
        (
            "CUDAExecutionProvider",
            {
                "device_id": "0",
                "arena_extend_strategy": "kSameAsRequested",
                "cudnn_conv_algo_search": "EXHAUSTIVE",
                "use_tf32": "0",
                "prefer_nhwc": "0",
                "enable_cuda_graph": "1",
            },
        )
    ]
    for providers, stream in zip(session.asked, streams, strict=True):
        providers[0][1]["user_compute_stream"] = stream
    for _ in range(3):
        assert_same(backend.infer(tiles), wanted)
    backend.close()
    assert not session.cuda.open_buffers
    with pytest.raises(BackendError, match="closed"):
        backend.infer(tiles)


def test_each_size_has_a_graph_that_is_recorded_before_the_first_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the slot's thread, over memory that does not move: the fake session checks both."""
    session = fake_gpu.install(monkeypatch)
    backend = build_ort_backend(build_graph(), replace(CUDA, slots=1), read_config())
    recorded = [(-1, graph, graph) for graph in (1, 2, 3)]  # warm, recorded, and replayed
    assert session.graph_ids == [graph for run in recorded for graph in run]
    session.graph_ids.clear()
    reference = build_ort_backend(build_graph(), CPU)
    with ThreadPoolExecutor(4) as pool:
        for count in (1, 2, 3, 4, 5, 8, 9):
            tiles = build_batch(count, 128, 128, seed=count)
            assert_same(pool.submit(backend.infer, tiles).result(), reference.infer(tiles))
    # The largest batch has the first graph; nine are cut into eight and one.
    assert session.graph_ids == [3, 2, 2, 2, 1, 1, 1, 3]


@pytest.mark.parametrize("flaw", ["refuses_graphs", "fails_to_record"])
def test_a_graph_that_cannot_be_recorded_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, flaw: str
) -> None:
    session = fake_gpu.install(monkeypatch)
    setattr(session, flaw, True)
    backend = build_ort_backend(build_graph(), CUDA, read_config())
    assert backend.reason == "CUDA provider, post-processing on the GPU"
    assert "no CUDA graphs" in caplog.text
    assert all("enable_cuda_graph" not in asked[0][1] for asked in session.asked[-2:])
    tiles = build_batch(2, 128, 128)
    assert_same(backend.infer(tiles), build_ort_backend(build_graph(), CPU).infer(tiles))
    backend.close()
    assert not session.cuda.open_buffers


def test_slots_are_on_each_gpu_and_are_lent_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a session of its own GPU: the fake session compares it with stream and binding."""
    session = fake_gpu.install(monkeypatch)
    backend = build_ort_backend(build_graph(), replace(CUDA, gpus=(0, 2)), read_config())
    assert backend.concurrency == 4
    assert backend.reason == "CUDA provider on GPUs 0, 2, post-processing on the GPU, CUDA graphs"
    assert [asked[0][1]["device_id"] for asked in session.asked] == ["0", "0", "2", "2"]
    assert sorted({buffer.device for buffer in session.cuda.buffers}) == [0, 2]
    used = []
    enqueue = session.run_with_iobinding

    def run(self: Any, *arguments: Any) -> None:
        used.append(self._options["device_id"])
        enqueue(self, *arguments)

    monkeypatch.setattr(session, "run_with_iobinding", run)
    tiles = build_batch(2, 128, 128)
    reference = build_ort_backend(build_graph(), CPU).infer(tiles)
    for _ in range(4):
        assert_same(backend.infer(tiles), reference)
    assert used == ["0", "2", "0", "2"]
    backend.close()
    assert not session.cuda.open_buffers


def test_a_gpu_that_cannot_be_used_leaves_nothing_on_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = fake_gpu.install(monkeypatch)
    session.cuda.count = 2
    build = build_cuda_session

    def build_session(model: Any, options: BackendOptions, **rest: Any) -> Any:
        if options.gpus == (1,):
            raise DeviceError("device cuda: GPU 1 has fallen off the bus")
        return build(model, options, **rest)

    monkeypatch.setattr(ort_backend, "build_cuda_session", build_session)
    with pytest.raises(DeviceError, match="GPU 1 has fallen off the bus"):
        build_ort_backend(build_graph(), replace(CUDA, gpus=(0, 1)), read_config())
    assert not session.cuda.open_buffers


def test_memory_that_the_gpu_does_not_have_is_a_device_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = fake_gpu.install(monkeypatch)
    session.cuda.memory_bytes = 100_000
    with pytest.raises(DeviceError, match=r"device cuda: CUDA cannot allocate .*OUT_OF_MEMORY"):
        build_ort_backend(build_graph(), CUDA, read_config())
    assert build_ort_backend(build_graph(), replace(CUDA, device="auto"), read_config()).device == (
        "cpu"
    )


def test_a_library_that_fails_at_the_first_run_is_a_device_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = fake_gpu.install(monkeypatch)

    def fail(self: Any, binding: Any, options: Any) -> None:
        raise RuntimeError("libcudnn_ops.so.9 is missing")

    monkeypatch.setattr(session, "run_with_iobinding", fail)
    with pytest.raises(DeviceError, match=r"device cuda: .*libcudnn_ops\.so\.9 is missing"):
        build_ort_backend(build_graph(), CUDA, read_config())


def test_many_canvases_on_cuda_are_neither_searched_nor_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = fake_gpu.install(monkeypatch)
    config = read_config(input=KEEP_RATIO_INPUT)
    backend = build_ort_backend(build_graph(), replace(CUDA, slots=1), config)
    options = session.asked[0][0][1]
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert "enable_cuda_graph" not in options
    reference = build_ort_backend(build_graph(), CPU)
    for canvas_hw in ((64, 96), (128, 64), (64, 96)):
        tiles = build_batch(3, *canvas_hw)
        assert_same(backend.infer(tiles), reference.infer(tiles))
    assert set(session.graph_ids) == {-1}


@pytest.mark.parametrize(
    ("mask_type", "tolerance"),
    [(onnx.TensorProto.FLOAT16, 1e-3), (onnx.TensorProto.BFLOAT16, 4e-3)],
)
def test_masks_of_half_precision_stay_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, mask_type: int, tolerance: float
) -> None:
    fake_gpu.install(monkeypatch)
    backend = build_ort_backend(build_typed_graph(mask_type), CUDA, read_config())
    tiles = build_batch(3, 128, 128)
    wanted = build_ort_backend(build_graph(), CPU).infer(tiles)
    assert_same(backend.infer(tiles), wanted, tolerance)


def test_a_graph_that_gives_other_shapes_is_an_error_and_no_garbage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gpu.install(monkeypatch)
    config = read_config(mask_stride=8)
    with pytest.raises(DeviceError, match=r"'mask_probs' .* has shape .* but the computed"):
        build_ort_backend(build_graph(), CUDA, config)


def test_an_engine_that_fails_on_one_canvas_fails_on_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gpu.install(monkeypatch)
    backend = build_ort_backend(build_graph(poisonable=True), CUDA, read_config())
    tiles = build_batch(2, 128, 128)
    tiles[0].image[0, 0, 0] = tiles[1].image[0, 0, 0] = 0
    assert len(backend.infer(tiles)) == 2
    tiles[1].image[0, 0, 0] = POISON
    with pytest.raises(BackendError, match=r"CUDA cannot finish what was queued: .*Gather"):
        backend.infer(tiles)
    assert len(backend.infer(tiles[:1])) == 1


def test_without_kernels_outputs_are_copied_and_the_reason_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = fake_gpu.install(monkeypatch)
    monkeypatch.setattr(ort_backend, "load_select", lambda *arguments: "no kernels here")
    backend = build_ort_backend(build_graph(), CUDA, read_config())
    assert backend.reason == "CUDA provider; outputs are copied to the host: no kernels here"
    assert "user_compute_stream" not in session.asked[0][0][1]
    assert backend.concurrency == 2
    assert len(backend.infer(build_batch(3, 128, 128))) == 3
    with pytest.raises(BackendError, match="bfloat16 masks cannot be copied"):
        build_ort_backend(build_typed_graph(onnx.TensorProto.BFLOAT16), CUDA, read_config())


def test_without_cuda_core_or_a_configuration_outputs_are_copied_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gpu.install(monkeypatch)
    backend = build_ort_backend(build_graph(), CUDA)
    assert backend.reason.endswith("copied to the host: nothing is known of the model")
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    backend = build_ort_backend(build_graph(), CUDA, read_config())
    assert "copied to the host: the CUDA kernels cannot be loaded (cuda-core" in backend.reason
    assert len(backend.infer(build_batch(3, 128, 128))) == 3
