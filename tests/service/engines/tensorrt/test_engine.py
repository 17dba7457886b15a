from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.types import Candidates, Tile, Window
from service.engines.base import BackendError, BackendOptions
from service.engines.builder import BuildFailed
from service.engines.device import CudaDevice
from service.engines.slots import SlotBackend
from service.engines.tensorrt import engine as trt
from service.engines.tensorrt.build import choose_options
from service.engines.tensorrt.engine import (
    build_trt_backend,
    find_obstacle,
    has_engine,
    load_trt_backend,
    plan_upgrade,
    store_engine,
)
from tests.service.engines.tensorrt.test_build import build_config
from tests.support.blob_model import KEEP_RATIO_INPUT
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_gpu import HostSelect
from tests.support.fake_tensorrt import Context, FakeTensorrt, K, build_error

OPTIONS = BackendOptions()
GRAPH = b"graph"


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "load_select", lambda *arguments: "no kernels here")


@pytest.fixture
def backend(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> SlotBackend:
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
def test_each_canvas_gets_its_own_result(backend: SlotBackend, batch: int) -> None:
    for repetition in range(3):  # warm-up, graph, graph again
        tiles = [build_tile(10 + 20 * i + repetition, 200 - i) for i in range(batch)]
        for tile, found in zip(tiles, backend.infer(tiles), strict=True):
            check(tile, found)


def test_the_engine_is_loaded_on_each_gpu(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> None:
    options = replace(OPTIONS, gpus=(0, 1), slots=1)
    backend = build_trt_backend(GRAPH, options, build_config(), tmp_path)
    assert backend.concurrency == 2 and " on GPUs 0, 1; post-processed on " in backend.reason
    tile = build_tile(255, 37, (128, 128))
    for _ in range(4):
        check(tile, backend.infer([tile])[0])
    assert {stream.device for stream in fake_tensorrt.cuda.streams.values()} == {0, 1}
    backend.close()
    assert not fake_tensorrt.cuda.open_buffers


@pytest.mark.parametrize("dtype", ["HALF", "BF16"])
def test_masks_of_half_precision_become_float32(
    dtype: str, fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    fake_tensorrt.dtypes["mask_probs"] = dtype
    backend = build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path)
    tile = build_tile(255, 37, (128, 128))
    check(tile, backend.infer([tile])[0])


def test_results_outlive_the_next_batch(backend: SlotBackend) -> None:
    tile = build_tile(90, 50)
    (kept,) = backend.infer([tile])
    backend.infer([build_tile(1, 2)])
    backend.infer([build_tile(3, 4)])
    check(tile, kept)


def test_batches_are_padded_to_a_few_sizes(
    backend: SlotBackend, fake_tensorrt: FakeTensorrt
) -> None:
    for batch in range(1, 7):
        backend.infer([build_tile(1, 1)] * batch)
    assert set(fake_tensorrt.batches) == {1, 4, 6}


def test_a_batch_that_is_too_large_is_cut(
    backend: SlotBackend, fake_tensorrt: FakeTensorrt
) -> None:
    tiles = [build_tile(10 + i, 9) for i in range(7)]
    for tile, found in zip(tiles, backend.infer(tiles), strict=True):
        check(tile, found)
    assert set(fake_tensorrt.batches) == {6, 1}


def test_a_canvas_outside_the_profiles_is_named(backend: SlotBackend) -> None:
    with pytest.raises(BackendError, match=r"no bucket contains the canvas \(16, 256\)"):
        backend.infer([build_tile(1, 1, (16, 256))])
    with pytest.raises(BackendError, match=r"a canvas of \(256, 256\)"):
        backend.infer([build_tile(1, 1, (256, 256))])
    tile = build_tile(7, 7)
    check(tile, backend.infer([tile])[0])


def test_a_graph_is_captured_after_one_run_and_replayed(
    fake_tensorrt: FakeTensorrt, fake_cuda: FakeCuda, tmp_path: Path
) -> None:
    options = replace(OPTIONS, slots=1)
    canvases = [[64, 128], [128, 64]]
    config = build_config(input=KEEP_RATIO_INPUT, canvases=canvases, limits={"max_batch": 1})
    backend = build_trt_backend(GRAPH, options, config, tmp_path)
    # Of each canvas one run to warm up and one replay; enqueued twice, once to be captured.
    assert fake_tensorrt.runs == 4
    assert fake_tensorrt.batches == [1, 1, 1, 1]
    for _ in range(10):
        backend.infer([build_tile(1, 1, (64, 128))])
    assert len(fake_cuda.graphs) == 2
    assert fake_tensorrt.runs == 14
    assert fake_tensorrt.batches == [1, 1, 1, 1]


def test_the_only_canvas_is_captured_before_the_first_request(
    fake_tensorrt: FakeTensorrt, fake_cuda: FakeCuda, tmp_path: Path
) -> None:
    backend = build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path)
    assert backend.concurrency == 2
    assert fake_tensorrt.batches == 2 * [8, 8, 4, 4, 1, 1]
    tile = build_tile(3, 4, (128, 128))
    check(tile, backend.infer([tile])[0])
    assert len(fake_cuda.graphs) == 6


def test_canvases_that_are_not_listed_run_without_graphs(
    fake_cuda: FakeCuda, fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    config = build_config(input=KEEP_RATIO_INPUT, limits={"max_batch": 6})
    backend = build_trt_backend(GRAPH, replace(OPTIONS, slots=1), config, tmp_path)
    canvases = [(h, w) for h in (32, 64) for w in (128, 96) if (h, w) != (32, 96)]
    canvases += [(w, h) for h, w in canvases]
    shapes = [(canvas, batch) for canvas in [*canvases, (64, 64)] for batch in (1, 4, 6)]
    for canvas, batch in [*shapes, *shapes]:
        tiles = [build_tile(20 + i, 30 + i, canvas) for i in range(batch)]
        for tile, found in zip(tiles, backend.infer(tiles), strict=True):
            check(tile, found)
    assert fake_cuda.graphs == []
    assert len(shapes) == 21
    assert fake_tensorrt.contexts == 2 * 21  # all were made again, for the eldest goes first


def test_without_graphs_batches_run_one_by_one(
    backend: SlotBackend, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorrt
) -> None:
    fake_cuda.graphs_work = False
    for red in range(1, 5):
        tile = build_tile(red, 9)
        check(tile, backend.infer([tile])[0])
    assert fake_cuda.graphs == []


def test_a_run_that_fails_is_named_and_gives_its_slot_back(
    backend: SlotBackend, fake_tensorrt: FakeTensorrt
) -> None:
    fake_tensorrt.refuses_runs = True
    for _ in range(5):
        with pytest.raises(BackendError, match=r"cannot run images \(1, 64, 96, 3\)"):
            backend.infer([build_tile(1, 1)])
    fake_tensorrt.refuses_runs = False
    tile = build_tile(5, 6)
    check(tile, backend.infer([tile])[0])


def test_errors_of_cuda_become_ours(
    backend: SlotBackend, fake_tensorrt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(Context, "compute", fail)
    with pytest.raises(
        BackendError, match=r"CUDA cannot finish what was queued: CUDA_ERROR_ILLEGAL_ADDRESS"
    ):
        backend.infer([build_tile(1, 1)] * 2)


def test_many_threads_get_their_own_results(backend: SlotBackend) -> None:
    def call(number: int) -> None:
        tiles = [
            build_tile(1 + (number * 7 + i) % 255, number % 255) for i in range(1 + number % 6)
        ]
        for tile, found in zip(tiles, backend.infer(tiles), strict=True):
            check(tile, found)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(call, range(1, 200)))


def test_the_reason_says_which_engine_and_where(
    backend: SlotBackend, fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    assert backend.reason.startswith("TensorRT 10.16.1.11 works (Fake GPU), engine ")
    assert backend.reason.endswith("post-processed on the host: no kernels here")
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
    fake_tensorrt: FakeTensorrt, tmp_path: Path, fake_cuda: FakeCuda
) -> None:
    fake_cuda.memory_bytes = 1000
    with pytest.raises(BackendError, match=r"cannot be set up: .*CUDA_ERROR_OUT_OF_MEMORY"):
        build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path)


def test_an_engine_of_other_types_is_refused(fake_tensorrt: FakeTensorrt, tmp_path: Path) -> None:
    fake_tensorrt.dtypes["scores"] = "HALF"
    with pytest.raises(BackendError, match="scores: the engine has HALF"):
        build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path)


def test_an_engine_that_gives_other_shapes_is_refused(
    fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    """Its outputs would not fit their memory."""
    with pytest.raises(BackendError, match=r"mask_probs: the engine gives \(8, 4, 32, 32\), exp"):
        build_trt_backend(GRAPH, OPTIONS, build_config(mask_stride=8), tmp_path)


def test_an_engine_with_other_tensors_or_profiles_is_refused(
    fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    fake_tensorrt.dtypes["areas"] = "FLOAT"
    with pytest.raises(BackendError, match=r"the engine has \['areas', 'images'"):
        build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path / "one")
    del fake_tensorrt.dtypes["areas"]
    fake_tensorrt.more_profiles = 1
    with pytest.raises(BackendError, match="the engine has 2 profiles for 1 buckets"):
        build_trt_backend(GRAPH, OPTIONS, build_config(), tmp_path / "two")


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


def test_a_closed_engine_says_so_and_is_free(backend: SlotBackend, fake_cuda: FakeCuda) -> None:
    backend.infer([build_tile(1, 1)])
    backend.close()
    backend.close()
    assert all(buffer.closed for buffer in fake_cuda.buffers)
    assert all(graph.closed for graph in fake_cuda.graphs)
    with pytest.raises(BackendError, match="closed"):
        backend.infer([build_tile(1, 1)])


def test_candidates_stay_on_the_device(
    fake_tensorrt: FakeTensorrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels: they get a copy of the outputs, and the slot goes on while they live."""
    selects: list[HostSelect] = []

    def load(device: CudaDevice, spec: object, stride: int) -> HostSelect:
        assert stride == 4
        selects.append(HostSelect(device))
        return selects[-1]

    monkeypatch.setattr(trt, "load_select", load)
    backend = build_trt_backend(GRAPH, replace(OPTIONS, slots=1), build_config(), tmp_path)
    assert backend.reason.endswith("post-processed on the device")
    selects[0].held = []
    for red in (10, 20, 30, 40):
        tiles = [build_tile(red + i, 1, (128, 128)) for i in range(3)]
        for tile, found in zip(tiles, backend.infer(tiles), strict=True):
            check(tile, found)
    assert len(selects[0].held) == 4


def test_an_upgrade_fills_the_cache_and_loads_from_it(
    fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    config = build_config()
    upgrade = plan_upgrade(GRAPH, OPTIONS, config, tmp_path)
    with pytest.raises(BackendError, match="is not in"):
        upgrade.load()
    progress: list[tuple[str, float]] = []
    upgrade._job(lambda status, done: progress.append((status, done)))  # what the child runs
    assert progress[0] == ("reading the graph", 0.0)
    assert progress[-1] == ("built", 1.0)
    assert upgrade.load().name == "tensorrt"
    assert fake_tensorrt.builds == 1


def test_an_upgrade_that_fails_in_its_process_says_why(
    fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    """The child process has no fake."""
    upgrade = plan_upgrade(GRAPH, OPTIONS, build_config(), tmp_path)
    with pytest.raises(BuildFailed, match="TensorRT cannot be used"):
        upgrade.build(lambda status, progress: None)


def test_an_engine_that_cannot_be_stored_is_a_failure(
    fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    """The server could not load it."""
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    options = choose_options(build_config())
    with pytest.raises(BackendError, match="not stored in"):
        store_engine(GRAPH, options, blocked / "engines", lambda status, progress: None)


def test_a_graph_that_cannot_be_built_names_its_node(
    fake_tensorrt: FakeTensorrt, tmp_path: Path
) -> None:
    fake_tensorrt.errors = [build_error("head/deform", "DeformConv", "no importer")]
    message = r"cannot read the graph: node head/deform \(DeformConv\): no importer"
    options = choose_options(build_config())
    with pytest.raises(BackendError, match=message):
        store_engine(GRAPH, options, tmp_path, lambda status, progress: None)
