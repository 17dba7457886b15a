from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.types import Candidates, Tile, Window
from service.engines.base import BackendError, BackendOptions
from service.engines.tensorrt import engine as trt
from service.engines.tensorrt.engine import (
    build_in_background,
    build_trt_backend,
    find_obstacle,
    has_engine,
    load_trt_backend,
)
from service.engines.tensorrt.slots import LruCache, SlotPool, pad_batch, padded_batches
from tests.service.engines.tensorrt.test_build import build_config
from tests.support import fake_cuda
from tests.support.blob_model import KEEP_RATIO_INPUT
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_tensorrt import Context, FakeTensorrt, K

OPTIONS = BackendOptions()
GRAPH = b"graph"


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise ImportError("no kernels here")

    monkeypatch.setattr(trt, "load_kernels", load)


@pytest.fixture
def backend(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> trt.TrtBackend:
    config = build_config(input=KEEP_RATIO_INPUT, limits={"max_batch": 6})
    return build_trt_backend(GRAPH, OPTIONS, config, tmp_path)


def build_tile(red: int, green: int, hw: tuple[int, int] = (64, 96)) -> Tile:
    image = np.zeros((*hw, 3), np.uint8)
    image[..., 0], image[..., 1] = red, green
    return Tile(image, hw, Window(0, 0, *hw))


def check(tile: Tile, found: object) -> None:
    """The fake engine's answer to a tile."""
    assert isinstance(found, Candidates)
    red, green = (float(value) / 255 for value in tile.image[0, 0, :2])
    np.testing.assert_allclose(found.scores, red / (1 + np.arange(K)), rtol=1e-6)
    assert found.labels.tolist() == list(range(K))
    height, width = tile.image.shape[:2]
    assert found.mask_probs.shape == (K, height // 4, width // 4)
    np.testing.assert_allclose(found.mask_probs, green, rtol=5e-3, atol=1e-6)
    assert found.mask_probs.dtype == np.float32


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6])
def test_each_canvas_gets_its_own_result(backend: trt.TrtBackend, batch: int) -> None:
    for repetition in range(3):  # warm-up, graph, graph again
        tiles = [build_tile(10 + 20 * i + repetition, 200 - i) for i in range(batch)]
        for tile, found in zip(tiles, backend.infer(tiles), strict=True):
            check(tile, found)


@pytest.mark.parametrize("dtype", ["HALF", "BF16"])
def test_masks_of_half_precision_become_float32(
    dtype: str, fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    fake_tensorrt.dtypes["mask_probs"] = dtype
    backend = build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path)
    tile = build_tile(255, 37, (128, 128))
    check(tile, backend.infer([tile])[0])


def test_results_outlive_the_next_batch(backend: trt.TrtBackend) -> None:
    tile = build_tile(90, 50)
    (kept,) = backend.infer([tile])
    backend.infer([build_tile(1, 2)])
    backend.infer([build_tile(3, 4)])
    check(tile, kept)


def test_batches_are_padded_to_a_few_sizes(
    backend: trt.TrtBackend, fake_tensorrt: FakeTensorrt
) -> None:
    for batch in range(1, 7):
        backend.infer([build_tile(1, 1)] * batch)
    assert set(fake_tensorrt.batches) == {1, 2, 4, 6}
    assert padded_batches(1) == (1,)
    assert padded_batches(8) == (1, 2, 4, 8)
    assert [pad_batch(n, 6) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]


def test_a_batch_that_is_too_large_is_refused(backend: trt.TrtBackend) -> None:
    with pytest.raises(BackendError, match="images: 7 canvases, the engine takes at most 6"):
        backend.infer([build_tile(1, 1)] * 7)


def test_a_canvas_outside_the_profiles_is_named(backend: trt.TrtBackend) -> None:
    with pytest.raises(BackendError, match=r"no bucket holds the canvas \(256, 256\)"):
        backend.infer([build_tile(1, 1, (256, 256))])
    tile = build_tile(7, 7)
    check(tile, backend.infer([tile])[0])


def test_a_graph_is_captured_after_one_run_and_replayed(
    fake_tensorrt: FakeTensorrt, fake_cuda: FakeCuda, tmp_path: Path
) -> None:
    backend = build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path)
    tile = build_tile(1, 1, (128, 128))
    for _ in range(10):
        backend.infer([tile])
    # The same slot each time: one warm-up run, ten replays; enqueued twice, once to be captured.
    assert len(fake_cuda.graphs) == 1
    assert fake_tensorrt.runs == 11
    assert fake_tensorrt.batches == [1, 1]


def test_graphs_that_are_not_used_any_more_go(
    backend: trt.TrtBackend, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorrt
) -> None:
    canvases = [(h, w) for h in (32, 64) for w in (128, 96) if (h, w) != (32, 96)]
    canvases += [(w, h) for h, w in canvases]
    shapes = [(canvas, batch) for canvas in [*canvases, (64, 64)] for batch in (1, 2, 4, 6)]
    for canvas, batch in [*shapes, *shapes]:
        tiles = [build_tile(20 + i, 30 + i, canvas) for i in range(batch)]
        for tile, found in zip(tiles, backend.infer(tiles), strict=True):
            check(tile, found)
    alive = [graph for graph in fake_cuda.graphs if not graph.closed]
    assert len(shapes) == 28
    assert len(alive) == 16
    assert fake_tensorrt.contexts == 1 + 2 * 28  # all were made again, for the eldest goes first


def test_without_graphs_batches_run_one_by_one(
    backend: trt.TrtBackend, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorrt
) -> None:
    fake_cuda.graphs_work = False
    for red in range(1, 5):
        tile = build_tile(red, 9)
        check(tile, backend.infer([tile])[0])
    assert fake_cuda.graphs == []


def test_a_run_that_fails_is_named_and_gives_its_slot_back(
    backend: trt.TrtBackend, fake_tensorrt: FakeTensorrt
) -> None:
    fake_tensorrt.refuses_runs = True
    for _ in range(5):
        with pytest.raises(BackendError, match=r"cannot run images \(1, 64, 96, 3\)"):
            backend.infer([build_tile(1, 1)])
    fake_tensorrt.refuses_runs = False
    tile = build_tile(5, 6)
    check(tile, backend.infer([tile])[0])


def test_errors_of_cuda_become_ours(
    backend: trt.TrtBackend, fake_tensorrt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(Context, "compute", fail)
    with pytest.raises(BackendError, match=r"images \(2, 64, 96, 3\): CUDA_ERROR_ILLEGAL_ADDRESS"):
        backend.infer([build_tile(1, 1)] * 2)


def test_many_threads_get_their_own_results(backend: trt.TrtBackend) -> None:
    def call(number: int) -> None:
        tiles = [
            build_tile(1 + (number * 7 + i) % 255, number % 255) for i in range(1 + number % 6)
        ]
        for tile, found in zip(tiles, backend.infer(tiles), strict=True):
            check(tile, found)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(call, range(1, 200)))


def test_the_reason_says_which_engine_and_where(
    backend: trt.TrtBackend, fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    assert backend.reason.startswith("TensorRT 10.16.1.11 works (Fake GPU), engine ")
    assert backend.reason.endswith("post-processed on the host, for no kernels here")
    assert (backend.name, backend.device, backend.precision) == ("tensorrt", "cuda", "fp32")
    config = build_config(input=KEEP_RATIO_INPUT, limits={"max_batch": 6})
    assert "from the cache" in build_trt_backend(GRAPH, OPTIONS, config, tmp_path).reason


def test_an_engine_that_tensorrt_refuses_is_built_again(
    fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    config = build_config()
    build_trt_backend(GRAPH, OPTIONS, config, tmp_path).close()
    fake_tensorrt.refuses_plans = 1
    build_trt_backend(GRAPH, OPTIONS, config, tmp_path).close()
    assert fake_tensorrt.builds == 2
    fake_tensorrt.refuses_plans = 2
    with pytest.raises(BackendError, match="refuses the engine: magicTag does not match"):
        build_trt_backend(GRAPH, OPTIONS, config, tmp_path)


def test_loading_never_builds(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> None:
    config = build_config()
    with pytest.raises(BackendError, match=f"is not in {tmp_path}"):
        load_trt_backend(GRAPH, OPTIONS, config, tmp_path)
    build_trt_backend(GRAPH, OPTIONS, config, tmp_path).close()
    load_trt_backend(GRAPH, OPTIONS, config, tmp_path).close()
    fake_tensorrt.refuses_plans = 1
    with pytest.raises(BackendError, match="magicTag"):
        load_trt_backend(GRAPH, OPTIONS, config, tmp_path)
    assert not has_engine(GRAPH, OPTIONS, config, tmp_path)
    assert fake_tensorrt.builds == 1


def test_a_gpu_without_enough_memory_is_told_of(
    fake_tensorrt: FakeTensorrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(size: int) -> None:
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(fake_cuda, "allocate", allocate)
    with pytest.raises(BackendError, match="cannot be set up: CUDA_ERROR_OUT_OF_MEMORY"):
        build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path)


def test_an_engine_of_other_types_is_refused(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> None:
    fake_tensorrt.dtypes["scores"] = "HALF"
    with pytest.raises(BackendError, match="scores: the engine has HALF"):
        build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path)


def test_whether_an_engine_is_there(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> None:
    config, file = build_config(), tmp_path / "model.onnx"
    file.write_bytes(GRAPH)
    assert not has_engine(file, OPTIONS, config, tmp_path)
    build_trt_backend(file, OPTIONS, config, tmp_path)
    assert has_engine(GRAPH, OPTIONS, config, tmp_path)
    assert not has_engine(GRAPH, replace(OPTIONS, precision="fp16"), config, tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (BackendOptions(device="cpu"), "device cpu was asked for"),
        (BackendOptions(precision="int8"), "the int8 graph is made for the CPU"),
    ],
)
def test_what_cannot_be_is_said(
    options: BackendOptions, reason: str, fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    assert (find_obstacle(options) or "").startswith(reason)
    with pytest.raises(BackendError, match=reason):
        build_trt_backend(GRAPH, options, build_config(), tmp_path)
    assert find_obstacle(OPTIONS) is None


def test_this_machine_says_why_it_has_none(tmp_path: Path) -> None:
    """Without fakes: no package, or no library, or no GPU."""
    obstacle = find_obstacle(OPTIONS)
    if obstacle is None:
        pytest.skip("TensorRT and a GPU are here")
    with pytest.raises(BackendError):
        build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path)


def test_a_closed_engine_says_so_and_is_free(backend: trt.TrtBackend, fake_cuda: FakeCuda) -> None:
    backend.infer([build_tile(1, 1)])
    backend.close()
    backend.close()
    assert all(buffer.closed for buffer in fake_cuda.buffers)
    assert all(graph.closed for graph in fake_cuda.graphs)
    with pytest.raises(BackendError, match="closed"):
        backend.infer([build_tile(1, 1)])


class StubSlot:
    """A slot that only knows whether it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_a_slot_that_is_out_is_closed_when_it_comes_back() -> None:
    slots = [StubSlot(), StubSlot()]
    pool = SlotPool(slots)  # type: ignore[arg-type]
    out = pool.take()
    pool.close()
    assert [slot.closed for slot in slots].count(True) == 1
    pool.give(out)
    assert all(slot.closed for slot in slots)
    with pytest.raises(BackendError, match="closed"):
        pool.take()


def test_a_batch_waits_for_a_slot_but_not_for_ever() -> None:
    pool = SlotPool([StubSlot()])  # type: ignore[list-item]
    out = pool.take()
    with pytest.raises(BackendError, match=r"no slot was given back within 0\.01 s"):
        pool.take(wait_s=0.01)
    threading.Timer(0.05, pool.give, [out]).start()
    assert pool.take() is out


def test_the_least_recently_used_value_goes() -> None:
    gone: list[str] = []
    values: LruCache[int, str] = LruCache(2, gone.append)

    def get(key: int) -> str:
        return values.get(key, lambda: f"value {key}")

    get(1), get(2), get(1), get(3)
    assert gone == ["value 2"]
    assert get(1) == "value 1"
    values.clear()
    assert sorted(gone) == ["value 1", "value 2", "value 3"]


def test_a_value_that_cannot_be_made_is_not_kept() -> None:
    values: LruCache[int, str] = LruCache(2, lambda value: None)

    def fail() -> str:
        raise BackendError("no")

    with pytest.raises(BackendError):
        values.get(1, fail)
    assert values.get(1, lambda: "made") == "made"


def test_candidates_on_the_device_keep_their_slot(
    fake_tensorrt: FakeTensorrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels: they get the pointers, and the slot is free when they release it."""
    releases: list[Callable[[], None]] = []
    batches: list[dict[str, object]] = []

    class Kernels:
        class CudaPostprocessor:
            def __init__(self, spec: object, stride: int) -> None:
                assert stride == 4

            def select(self, batch: dict[str, object], stream: int) -> list[str]:
                batches.append(batch)
                releases.append(batch["release"])  # type: ignore[arg-type]
                return ["candidates"] * int(str(batch["batch"]))

        DeviceBatch = staticmethod(lambda **fields: fields)

    monkeypatch.setattr(trt, "load_kernels", lambda: Kernels)
    backend = build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path)
    assert backend.reason.endswith("post-processed on the device")
    tile = build_tile(1, 1, (128, 128))
    for _ in range(3):
        assert len(backend.infer([tile] * 3)) == 3
    assert batches[0]["mask_hw"] == (32, 32)
    assert (batches[0]["batch"], batches[0]["candidates"]) == (3, K)
    assert len({batch["scores"] for batch in batches}) == 3
    assert not backend._pool._free
    for release in releases:
        release()
        release()  # a second time does nothing
    assert len(backend._pool._free) == 3
    backend.close()


def test_in_the_background(
    fake_tensorrt: FakeTensorrt, tmp_path: Path, backend: trt.TrtBackend
) -> None:
    """The builder's process has no fake, so it fails and the first goes on, with the reason."""
    config = build_config()
    switching = build_in_background(backend, GRAPH, OPTIONS, config, tmp_path, lambda new: None)
    switching._thread.join(60)
    assert switching.status == "failed"
    assert "TensorRT cannot be used" in switching.reason
    assert switching.concurrency == trt.CONCURRENCY
    switching.close()
