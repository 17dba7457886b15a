from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.postprocess import TileCandidates
from pipeline.types import Candidates, Tile, Window
from service.engines.aoti_slots import GraphSlot, Inputs, SlotPool, batch_sizes
from service.engines.base import BackendError

CANDIDATES = 4


class HostDevice:
    """A GPU's stand-in: recorded runs write into the outputs of the first one, as graphs do."""

    stream = 77

    def __init__(self) -> None:
        self.log: list[str] = []
        self.shapes: list[tuple[int, tuple[int, int]]] = []

    def build_inputs(self, batch: int, canvas_hw: tuple[int, int]) -> Inputs:
        self.shapes.append((batch, canvas_hw))
        images = np.empty((batch, *canvas_hw, 3), np.uint8)
        valid_hw = np.empty((batch, 2), np.int64)
        device = [images.copy(), valid_hw.copy()]
        return Inputs(images, valid_hw, [images, valid_hw], device)

    def upload(self, inputs: Inputs) -> None:
        self.log.append("upload")
        for source, target in zip(inputs.host, inputs.device, strict=True):
            target[:] = source

    def wait_for_upload(self) -> None:
        self.log.append("wait")

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Callable[[], None], Sequence[Any]]:
        self.log.append("capture")
        outputs = run()
        for output in outputs:
            output[:] = 0  # a recording computes nothing

        def replay() -> None:
            self.log.append("replay")
            for kept, new in zip(outputs, run(), strict=True):
                kept[:] = new

        return replay, outputs

    def clone(self, tensors: Sequence[Any]) -> list[Any]:
        return [tensor.copy() for tensor in tensors]

    def to_host(self, tensors: Sequence[Any]) -> list[Any]:
        return [tensor.copy() for tensor in tensors]

    def close(self) -> None:
        self.log.append("close")


def run_package(inputs: Sequence[Any]) -> list[Any]:
    """As many candidates as the image's first pixel says; their masks show the valid rows."""
    images, valid_hw = inputs
    batch, height, width, _ = images.shape
    scores = np.zeros((batch, CANDIDATES), np.float32)
    masks = np.zeros((batch, CANDIDATES, height // 4, width // 4), np.float32)
    for row, image in enumerate(images):
        count = int(image[0, 0, 0])
        scores[row, :count] = np.linspace(0.9, 0.5, count)
        masks[row, :count, : valid_hw[row, 0] // 4] = 1
    return [scores, np.tile(np.arange(CANDIDATES), (batch, 1)), masks]


def build_tiles(counts: Sequence[int], canvas_hw: tuple[int, int] = (32, 64)) -> list[Tile]:
    tiles = []
    for index, count in enumerate(counts):
        valid_hw = (canvas_hw[0] - 4 * index, canvas_hw[1])
        image = np.full((*canvas_hw, 3), count, np.uint8)
        tiles.append(Tile(image, valid_hw, Window(0, 0, *valid_hw)))
    return tiles


def build_slot(device: HostDevice, select: Any = None, max_graphs: int = 16) -> GraphSlot:
    return GraphSlot(device, run_package, (1, 2, 4), select, threading.Lock(), max_graphs)


def infer(slot: GraphSlot, tiles: Sequence[Tile]) -> list[Candidates]:
    found = slot.run(tiles)
    assert all(isinstance(candidates, Candidates) for candidates in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_recorded_batches_are_powers_of_two_and_the_largest(
    max_batch: int, sizes: tuple[int, ...]
) -> None:
    assert batch_sizes(max_batch) == sizes


def test_a_padded_batch_gives_each_canvas_its_own_candidates() -> None:
    device = HostDevice()
    found = infer(build_slot(device), build_tiles([2, 0, 4]))
    assert [len(candidates.scores) for candidates in found] == [2, 0, 4]
    assert device.shapes == [(4, (32, 64))]
    for index in (0, 2):
        assert (found[index].mask_probs[0].sum(axis=1) > 0).sum() == 8 - index


def test_what_padded_an_earlier_batch_is_not_seen() -> None:
    slot = build_slot(HostDevice())
    infer(slot, build_tiles([4, 4, 4, 4]))
    found = infer(slot, build_tiles([1, 1, 1]))
    assert [len(candidates.scores) for candidates in found] == [1, 1, 1]


def test_results_outlive_the_next_batch_of_the_slot() -> None:
    slot = build_slot(HostDevice())
    (first,) = infer(slot, build_tiles([3]))
    before = first.mask_probs.copy()
    infer(slot, build_tiles([0]))
    np.testing.assert_array_equal(first.mask_probs, before)


def test_a_shape_is_recorded_once_and_the_least_used_one_goes() -> None:
    device = HostDevice()
    slot = build_slot(device, max_graphs=2)
    for canvas in ((32, 32), (32, 64), (32, 32), (64, 64), (32, 32), (32, 64)):
        infer(slot, build_tiles([1], canvas))
    assert [canvas for _, canvas in device.shapes] == [(32, 32), (32, 64), (64, 64), (32, 64)]


def test_pinned_memory_is_not_written_before_its_copy_is_done() -> None:
    device = HostDevice()
    infer(build_slot(device), build_tiles([1]))
    assert device.log == ["upload", "capture", "wait", "upload", "replay"]


def test_candidates_on_the_device_own_their_outputs() -> None:
    calls: list[tuple[list[Any], int]] = []

    def select(outputs: list[Any], stream: int) -> list[TileCandidates]:
        calls.append((outputs, stream))
        return [Candidates(*arrays) for arrays in zip(*outputs, strict=True)]

    slot = build_slot(HostDevice(), select)
    found = slot.run(build_tiles([1, 2, 3]))
    ((outputs, stream),) = calls
    assert len(found) == 3 and stream == 77
    assert [len(output) for output in outputs] == [3, 3, 3]
    before = outputs[0].copy()
    slot.run(build_tiles([4, 4, 4]))
    np.testing.assert_array_equal(outputs[0], before)
    outputs.clear()  # what a release does


class Plain:
    """A slot that does nothing."""

    closed = False

    def run(self, tiles: Sequence[Tile]) -> list[TileCandidates]:
        return []

    def close(self) -> None:
        self.closed = True


def test_a_slot_is_waited_for() -> None:
    pool = SlotPool([Plain()])
    held = pool.take()
    timer = threading.Timer(0.05, pool.give, [held])
    timer.start()
    assert pool.take() is held
    timer.join()


def test_a_slot_that_never_comes_back_is_an_error() -> None:
    pool = SlotPool([Plain()], wait_s=0.01)
    pool.take()
    with pytest.raises(BackendError, match="given back within"):
        pool.take()


def test_a_closed_pool_closes_each_slot_when_it_is_free() -> None:
    slots = [Plain(), Plain()]
    pool = SlotPool(slots)
    held = pool.take()
    pool.close()
    assert sum(slot.closed for slot in slots) == 1
    with pytest.raises(BackendError, match="closed"):
        pool.take()
    pool.give(held)
    assert all(slot.closed for slot in slots)
    pool.close()


def test_who_waits_for_a_slot_hears_that_the_pool_is_closed() -> None:
    pool = SlotPool([Plain()])
    pool.take()
    timer = threading.Timer(0.05, pool.close)
    timer.start()
    with pytest.raises(BackendError, match="closed"):
        pool.take()
    timer.join()
