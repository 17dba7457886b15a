"""The slot of all engines on a GPU, over a fake CUDA whose streams run as late as they may."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.canvases import choose_canvases
from pipeline.postprocess import TileCandidates
from pipeline.types import Candidates
from service.engines.base import BackendError
from service.engines.calls import BatchShape, EngineRun, SlotMemory
from service.engines.device import CudaDevice, CudaError
from service.engines.device_slot import (
    GPU_SLOTS,
    DeviceSlot,
    build_device_slots,
    list_batch_sizes,
)
from service.engines.kernels.select import DeviceBatch
from tests.service.engines.test_ort_session import read_config
from tests.support.blob_model import KEEP_RATIO_INPUT, POISON
from tests.support.device_slots import CANVAS, CANVASES, LAYOUT, Rig, build_tiles, check
from tests.support.fake_cuda import FakeCuda, read_memory
from tests.support.fake_gpu import HostSelect


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [
        *((1, (1,)), (2, (1, 2)), (4, (1, 4)), (6, (1, 4, 6)), (8, (1, 4, 8))),
        *((16, (1, 4, 8, 16)), (20, (1, 4, 8, 16, 20)), (32, (1, 4, 8, 16, 32))),
    ],
)
def test_batch_sizes_are_few_and_the_largest_is_one_of_them(
    max_batch: int, sizes: tuple[int, ...]
) -> None:
    assert list_batch_sizes(max_batch) == sizes


@pytest.mark.parametrize("counts", [[2], [1, 3], [2, 0, 4], [1, 2, 3, 4]])
def test_each_canvas_gets_its_own_candidates(either: Rig, counts: list[int]) -> None:
    for _ in range(3):
        check(build_tiles(counts), either.slot.infer(build_tiles(counts)))
    padded = 1 if len(counts) == 1 else 4
    assert either.call.bound == [BatchShape(padded, CANVAS)]


def test_canvases_of_any_size_share_the_memory(either: Rig) -> None:
    for canvas_hw in (*CANVASES, *CANVASES, (32, 32)):
        tiles = build_tiles([1, 2, 3], canvas_hw)
        check(tiles, either.slot.infer(tiles))


def test_a_canvas_without_candidates_has_none(either: Rig) -> None:
    (found,) = either.slot.infer(build_tiles([0]))
    assert isinstance(found, Candidates)
    assert found.mask_probs.shape == (0, 8, 16)


@pytest.mark.parametrize("mask_type", ["float16", "bfloat16"])
@pytest.mark.parametrize("on_host", [True, False])
def test_masks_of_half_precision(fake_cuda: FakeCuda, mask_type: Any, on_host: bool) -> None:
    rig = Rig(fake_cuda, layout=replace(LAYOUT, mask_type=mask_type))
    if on_host:
        rig.slot._select = None
    tiles = build_tiles([3, 2, 1])
    check(tiles, rig.slot.infer(tiles))


def test_only_masks_of_used_slots_are_copied_to_the_host(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.slot._select = None
    rig.slot.infer(build_tiles([2, 1]))
    sizes: list[int] = []
    copy = rig.device.copy

    def watch(target: int, source: int, size_bytes: int, stream: int) -> None:
        sizes.append(size_bytes)
        copy(target, source, size_bytes, stream)

    monkeypatch.setattr(rig.device, "copy", watch)
    tiles = build_tiles([2, 1])
    check(tiles, rig.slot.infer(tiles))
    assert sizes[1:] == [2 * 4 * 8, 2 * 4 * 4, *(2 * 8 * 16 * 4,) * 2]


def test_padding_is_black_and_wholly_valid(rig: Rig) -> None:
    rig.slot.infer(build_tiles([9, 9, 9, 9], (64, 64)))
    for counts in ([3, 3, 3], [2, 2, 2, 2], [1, 1, 1]):
        rig.slot.infer(build_tiles(counts))
        images, valid_hw = rig.call.seen[-1]
        padding = slice(len(counts), None)
        assert not images[padding].any()
        assert (valid_hw[padding] == CANVAS).all()
        assert (images[: len(counts)] == counts[0]).all()


def test_an_image_that_makes_the_engine_fail_fails_no_later_batch(either: Rig) -> None:
    for _ in range(2):
        with pytest.raises(Exception, match="poisoned"):
            either.slot.infer(build_tiles([1, 2, 3, POISON]))
        tiles = build_tiles([1, 2, 3])
        check(tiles, either.slot.infer(tiles))


def test_pinned_memory_is_not_written_before_its_copy_is_done(fake_cuda: FakeCuda) -> None:
    """Nobody waits for the stream between two batches, and both uploads are late."""
    kept: list[DeviceBatch] = []

    def select(batch: DeviceBatch, stream: int) -> list[TileCandidates]:
        kept.append(batch)
        return []

    rig = Rig(fake_cuda, select=select)
    rig.slot.infer(build_tiles([4, 4]))
    for count in (1, 3, 2):
        rig.slot.infer(build_tiles([count, count]))
    rig.device.synchronize(rig.slot._stream)
    used = [(read_memory(b.scores, np.float32, (2, 4)) > 0).sum(axis=1).tolist() for b in kept]
    assert used == [[4, 4], [1, 1], [3, 3], [2, 2]]


def test_candidates_get_the_batch_that_was_asked_for_and_the_slots_stream(
    fake_cuda: FakeCuda,
) -> None:
    seen: list[tuple[DeviceBatch, int]] = []

    def select(batch: DeviceBatch, stream: int) -> tuple[TileCandidates, ...]:
        seen.append((batch, stream))
        return ()

    rig = Rig(fake_cuda, select=select)
    assert rig.slot.infer(build_tiles([1, 2, 3])) == []
    ((batch, stream),) = seen
    assert (batch.batch, batch.candidates, batch.mask_hw) == (3, 4, (8, 16))
    assert batch.mask_type == "float32"
    assert {stream} == fake_cuda.open_streams - rig.streams


def test_results_outlive_the_next_batches(either: Rig) -> None:
    if isinstance(either.select, HostSelect):
        either.select.held = []
    tiles = [build_tiles([count, 4 - count]) for count in (1, 2, 3, 4)]
    found = [either.slot.infer(batch) for batch in tiles]
    for batch, candidates in zip(tiles, found, strict=True):
        check(batch, candidates)


def test_outputs_that_are_held_are_not_written_again(fake_cuda: FakeCuda) -> None:
    kept: list[DeviceBatch] = []

    def select(batch: DeviceBatch, stream: int) -> list[TileCandidates]:
        fake_cuda.streams[stream].sync()
        kept.append(batch)
        return []

    rig = Rig(fake_cuda, select=select)
    counts = [[1, 2], [3, 4], [2, 2], [4, 1]]
    for batch in counts:
        rig.slot.infer(build_tiles(batch))
    used = [(read_memory(b.scores, np.float32, (2, 4)) > 0).sum(axis=1).tolist() for b in kept]
    assert used == counts
    assert len({batch.scores for batch in kept}) == 4


def test_other_shapes_run_without_graphs_and_the_least_recently_used_goes(
    fake_cuda: FakeCuda,
) -> None:
    rig = Rig(fake_cuda, max_shapes=2)
    rig.slot.warm_up((32, 32))
    warm = [BatchShape(size, (32, 32)) for size in (4, 1)]
    graphs = len(fake_cuda.graphs)
    assert graphs == 2
    first, second, third = (BatchShape(1, canvas_hw) for canvas_hw in CANVASES)
    for shape in (first, second, first, third, first, second, warm[1]):
        tiles = build_tiles([1], shape.canvas_hw)
        check(tiles, rig.slot.infer(tiles))
    assert rig.call.bound == [*warm, first, second, third, second]
    assert rig.call.unbound == [second, third]
    assert len(fake_cuda.graphs) == graphs, "a graph was recorded in the path of a request"
    assert not any(graph.closed for graph in fake_cuda.graphs), "what is warm stays"
    rig.slot.close()
    assert all(graph.closed for graph in fake_cuda.graphs)
    assert set(rig.call.closed) == set(warm)
    assert sorted(map(str, rig.call.unbound)) == sorted(map(str, rig.call.bound))


def test_a_shape_that_cannot_be_bound_is_tried_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(shape: BatchShape, memory: SlotMemory) -> EngineRun:
        raise BackendError("no context")

    with monkeypatch.context() as patch:
        patch.setattr(rig.call, "bind", refuse)
        with pytest.raises(BackendError, match="no context"):
            rig.slot.infer(build_tiles([1]))
    tiles = build_tiles([1])
    check(tiles, rig.slot.infer(tiles))


def test_a_run_is_recorded_after_one_run_and_then_replayed(rig: Rig) -> None:
    rig.slot.warm_up(CANVAS)
    assert rig.call.runs == 4  # each of two sizes once before it is recorded, and once as a graph
    for _ in range(10):
        rig.slot.infer(build_tiles([1]))
    assert rig.call.runs == 14
    assert len(rig.cuda.graphs) == 2


def test_without_graphs_batches_run_one_by_one(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.cuda.graphs_work = False
    rig.slot.warm_up(CANVAS)
    assert not rig.slot.has_graphs
    for canvas_hw in (*CANVASES, *CANVASES):
        tiles = build_tiles([3, 1], canvas_hw)
        check(tiles, rig.slot.infer(tiles))
    assert caplog.text.count("no CUDA graphs, for images 4x32x64: this stream cannot be") == 1
    assert rig.cuda.graphs == []
    assert rig.call.runs == 3 + 6  # the first shape ran once more, to be recorded
    assert BatchShape(4, CANVAS) in rig.slot._warm, "what is warm is bound, with or without a graph"


def test_one_slot_of_the_process_records_at_a_time(fake_cuda: FakeCuda) -> None:
    """Slots of different engines, too: a new version is warmed up while another one is served."""
    rigs = [Rig(fake_cuda), Rig(fake_cuda)]
    recording: list[int] = []
    most: list[int] = []

    def watch(rig: Rig) -> None:
        capture = rig.device.capture

        def slow(stream: int, work: Callable[[], object]) -> Any:
            recording.append(stream)
            most.append(len(recording))
            time.sleep(0.005)
            recording.remove(stream)
            return capture(stream, work)

        rig.device.capture = slow  # type: ignore[method-assign]

    allocate = fake_cuda.allocate

    def check_recording(size: int) -> Any:
        assert not recording, "an allocation makes the recording fail, and the allocation too"
        return allocate(size)

    fake_cuda.allocate = check_recording  # type: ignore[method-assign]
    other = CudaDevice()

    def use_memory() -> None:
        other.activate()
        for _ in range(100):
            other.free(other.allocate(8))
            other.free(other.allocate_pinned(8))
            time.sleep(0.0002)

    for rig in rigs:
        watch(rig)
    with ThreadPoolExecutor(3) as pool:
        user = pool.submit(use_memory)
        list(pool.map(lambda rig: rig.slot.warm_up(CANVAS), rigs))
        user.result()
    assert most == [1] * 4


def test_a_canvas_larger_than_the_memory_is_refused(either: Rig) -> None:
    with pytest.raises(BackendError, match=r"canvas of \(64, 96\), the engine takes at most 4096"):
        either.slot.infer(build_tiles([1], (64, 96)))
    tiles = build_tiles([2], (64, 64))
    check(tiles, either.slot.infer(tiles))


class TestBuilding:
    def build(
        self, cuda: FakeCuda, count: int | None = None, *, threads: bool = False, **config: Any
    ) -> tuple[list[Any], bool, list[Rig]]:
        rigs: list[Rig] = []

        def build_slot() -> DeviceSlot:
            rigs.append(Rig(cuda, canvases=[(128, 128)], max_batch=8))
            return rigs[-1].slot

        slots, has_graphs = build_device_slots(
            count, build_slot, read_config(**config), threads=threads
        )
        return slots, has_graphs, rigs

    def test_every_size_of_the_only_canvas_is_recorded_before_the_first_request(
        self, fake_cuda: FakeCuda
    ) -> None:
        slots, has_graphs, rigs = self.build(fake_cuda)
        assert len(slots) == GPU_SLOTS and has_graphs
        for rig in rigs:
            assert rig.call.bound == [BatchShape(size, (128, 128)) for size in (8, 4, 1)]
        slots[0].infer(build_tiles([1, 2, 3], (128, 128)))
        assert len(fake_cuda.graphs) == 3 * GPU_SLOTS

    def test_every_size_of_the_models_canvases_is_recorded(self, fake_cuda: FakeCuda) -> None:
        canvases = choose_canvases(read_config(input=KEEP_RATIO_INPUT).input)
        slots, has_graphs, rigs = self.build(
            fake_cuda, 1, input=KEEP_RATIO_INPUT, canvases=canvases
        )
        assert len(slots) == 1 and has_graphs
        wanted = {BatchShape(size, canvas) for size in (1, 4, 8) for canvas in canvases}
        assert set(rigs[0].call.bound) == wanted and len(rigs[0].call.bound) == len(wanted)
        assert len(fake_cuda.graphs) == len(wanted) > 3
        largest = max(canvas[0] * canvas[1] for canvas in canvases)
        assert rigs[0].call.bound[0].pixels == largest, "libraries allocate for the largest first"

    def test_canvases_that_are_not_listed_are_never_recorded(
        self, fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture
    ) -> None:
        slots, has_graphs, rigs = self.build(fake_cuda, 1, input=KEEP_RATIO_INPUT)
        assert len(slots) == 1 and has_graphs
        assert rigs[0].call.bound == []
        assert "blobs lists no canvases in config.json" in caplog.text
        slots[0].infer(build_tiles([1], (64, 64)))
        assert fake_cuda.graphs == []

    @pytest.mark.parametrize("threads", [False, True])
    def test_slots_have_a_thread_where_they_need_one(
        self, fake_cuda: FakeCuda, threads: bool
    ) -> None:
        slots, _, rigs = self.build(fake_cuda, 1, threads=threads)
        tiles = build_tiles([1, 2], (128, 128))
        check(tiles, slots[0].infer(tiles))
        assert isinstance(rigs[0].select, HostSelect)
        assert rigs[0].select.threads == ({"slot"} if threads else {"MainThread"})
        slots[0].close()

    def test_a_recording_that_fails_is_told_of(self, fake_cuda: FakeCuda) -> None:
        fake_cuda.graphs_work = False
        assert self.build(fake_cuda)[1] is False

    @pytest.mark.parametrize(
        ("error", "expected", "message"),
        [
            (RuntimeError("cudnn is missing"), CudaError, "prepare the engine: cudnn is missing"),
            (BackendError("not made for this"), BackendError, "^not made for this$"),
        ],
    )
    @pytest.mark.parametrize("threads", [False, True])
    def test_one_that_fails_closes_those_that_were_built(
        self,
        fake_cuda: FakeCuda,
        threads: bool,
        error: Exception,
        expected: type[Exception],
        message: str,
    ) -> None:
        rigs: list[Rig] = []

        def build_slot() -> DeviceSlot:
            rigs.append(Rig(fake_cuda, canvases=[(128, 128)], max_batch=2))
            if len(rigs) == 2:
                assert isinstance(rigs[1].select, HostSelect)
                rigs[1].select.fail = error
            return rigs[-1].slot

        with pytest.raises(expected, match=message):
            build_device_slots(2, build_slot, read_config(), threads=threads)
        assert [rig.call.is_closed for rig in rigs] == [True, True]
        assert not fake_cuda.open_buffers
