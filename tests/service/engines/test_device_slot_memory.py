"""Memory, streams and graphs of a slot on a GPU: reused, given back, and freed at the end."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.engines.base import BackendError
from service.engines.device import CudaDevice, CudaError
from service.engines.device_slot import KEPT_BUFFERS, DeviceSlot
from tests.support.device_slots import CANVASES, PixelCall, Rig, build_tiles, check
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_gpu import HostSelect


def test_buffers_come_back_once_and_few_are_kept(rig: Rig) -> None:
    assert isinstance(rig.select, HostSelect)
    rig.select.held = []
    rig.slot.infer(build_tiles([1]))
    fixed = len(rig.cuda.open_buffers) - 1
    for _ in range(5):
        rig.slot.infer(build_tiles([1]))
    assert len(rig.cuda.open_buffers) == fixed + 6
    for release in rig.select.held * 2:  # a second call does nothing
        release()
    rig.select.held = []
    rig.slot.infer(build_tiles([1]))
    assert len(rig.cuda.open_buffers) == fixed + KEPT_BUFFERS
    rig.slot.infer(build_tiles([1]))
    rig.slot.infer(build_tiles([1]))
    assert len(rig.cuda.open_buffers) == fixed + 3
    assert len(rig.select.held) == 3


def test_a_buffer_that_is_too_small_is_replaced(rig: Rig) -> None:
    rig.slot.infer(build_tiles([1]))
    before = len(rig.cuda.open_buffers)
    tiles = build_tiles([1, 2, 3, 4], (64, 64))
    check(tiles, rig.slot.infer(tiles))
    check(tiles[:1], rig.slot.infer(tiles[:1]))  # in the larger one
    assert len(rig.cuda.open_buffers) == before


def test_a_failure_gives_the_memory_back(rig: Rig) -> None:
    assert isinstance(rig.select, HostSelect)
    tiles = build_tiles([1, 2])
    rig.select.fail = ValueError("no kernel")
    for _ in range(3):
        with pytest.raises(ValueError, match="no kernel"):
            rig.slot.infer(tiles)
        assert all(stream.is_idle for stream in rig.cuda.streams.values())
    memory = rig.cuda.open_buffers
    rig.select.fail = None
    check(tiles, rig.slot.infer(tiles))
    assert rig.cuda.open_buffers == memory


def test_a_closed_slot_frees_everything(either: Rig) -> None:
    either.slot.infer(build_tiles([1, 2]))
    either.slot.infer(build_tiles([1], (64, 64)))
    either.slot.close()
    assert not either.cuda.open_buffers
    assert either.cuda.open_streams == either.streams
    assert all(graph.closed for graph in either.cuda.graphs)
    assert either.call.is_closed


def test_a_slot_on_a_dead_device_closes_all_that_it_can(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.slot.infer(build_tiles([1, 2]))
    free, failed = rig.device.free, list[int]()

    def fail_once(memory: Any) -> None:
        if not failed:
            failed.append(memory.pointer)
            raise CudaError("CUDA cannot free 8 bytes: unspecified launch failure")
        free(memory)

    monkeypatch.setattr(rig.device, "free", fail_once)
    with pytest.raises(CudaError, match="unspecified launch failure"):
        rig.slot.close()
    assert rig.cuda.open_streams == rig.streams
    assert rig.call.is_closed
    assert failed[0] in rig.cuda.open_buffers and len(rig.cuda.open_buffers) < 4


def test_a_batch_that_cannot_be_written_leaves_no_pixels_behind(fake_cuda: FakeCuda) -> None:
    rig = Rig(fake_cuda, max_batch=6)
    rig.slot.infer(build_tiles([1]))
    tiles = build_tiles([9] * 6)
    tiles[4] = build_tiles([9], (64, 32))[0]
    with pytest.raises(ValueError, match="broadcast"):
        rig.slot.infer(tiles)
    rig.slot.infer(build_tiles([1, 1, 1]))
    assert not rig.call.seen[-1][0][3:].any()


def test_any_thread_may_use_a_slot(either: Rig) -> None:
    tiles = build_tiles([1, 2, 3])
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            check(tiles, pool.submit(either.slot.infer, tiles).result())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(either.slot.close).result()
    assert not either.cuda.open_buffers


def test_candidates_may_outlive_their_slot(rig: Rig) -> None:
    assert isinstance(rig.select, HostSelect)
    rig.select.held = []
    rig.slot.infer(build_tiles([1, 2]))
    (release,) = rig.select.held
    rig.slot.close()
    (buffer,) = (b for b in rig.cuda.buffers if not b.closed)
    gone = weakref.ref(buffer.owner)
    release()
    rig.cuda.buffers.clear()
    rig.select.held.clear()
    rig.slot, buffer, release = None, None, None  # type: ignore[assignment]
    gc.collect()
    assert gone() is None


def test_an_engine_that_cannot_be_bound_leaves_no_stream(fake_cuda: FakeCuda) -> None:
    device = CudaDevice()
    before = fake_cuda.open_streams

    def fail(stream: int) -> PixelCall:
        raise BackendError("not this stream")

    with pytest.raises(BackendError, match="not this stream"):
        DeviceSlot(device, fail, max_batch=2, canvases=CANVASES, select=None)
    assert fake_cuda.open_streams == before
