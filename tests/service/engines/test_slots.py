from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from pipeline.postprocess import TileCandidates
from pipeline.types import Candidates, Int64, Tile, UInt8, Window
from service.engines.base import BackendError, BackendOptions, Interruptible
from service.engines.slots import (
    WAIT_S,
    HostSlot,
    Slot,
    SlotBackend,
    SlotQueue,
    ThreadSlot,
    build_on_each,
    describe_gpus,
)
from tests.support.waiting import poll_until

wait_for = partial(poll_until, timeout_s=20.0, pause_s=0.005)


def build_tiles(count: int, value: int = 200) -> list[Tile]:
    image = np.full((8, 8, 3), value, np.uint8)
    return [Tile(image, (8, 8), Window(0, 0, 8, 8))] * count


class PlainSlot:
    """Answers with the number of its canvases; can be held and can fail."""

    def __init__(self) -> None:
        self.closed = 0
        self.interrupted = 0
        self.batches: list[int] = []
        self.threads: list[str] = []
        self.fail: Exception | None = None
        self.inside = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        assert not self.closed
        self.batches.append(len(tiles))
        self.threads.append(threading.current_thread().name)
        self.inside.set()
        assert self.go.wait(20)
        if self.fail is not None:
            raise self.fail
        mask = np.zeros((1, 2, 2), np.float32)
        return [Candidates(np.ones(1, np.float32), np.array([len(tiles)]), mask) for _ in tiles]

    def interrupt(self) -> None:
        self.interrupted += 1

    def close(self) -> None:
        self.closed += 1


def build_backend(*slots: Slot, max_batch: int | None = None) -> SlotBackend:
    return SlotBackend(
        slots, name="plain", device="cpu", precision="fp32", reason="test", max_batch=max_batch
    )


class TestQueue:
    def test_a_slot_is_waited_for(self) -> None:
        queue = SlotQueue([PlainSlot()])
        held = queue.take()
        timer = threading.Timer(0.05, queue.give, [held])
        timer.start()
        assert queue.take() is held
        timer.join()

    def test_a_slot_that_never_comes_back_is_an_error(self) -> None:
        queue = SlotQueue([PlainSlot()], wait_s=0.01)
        queue.take()
        with pytest.raises(BackendError, match=r"no slot was returned within 0\.01 s"):
            queue.take()

    def test_a_closed_queue_closes_each_slot_when_it_is_free(self) -> None:
        slots = [PlainSlot(), PlainSlot()]
        queue = SlotQueue(slots)
        held = queue.take()
        queue.close()
        assert sorted(slot.closed for slot in slots) == [0, 1]
        with pytest.raises(BackendError, match="closed"):
            queue.take()
        queue.give(held)
        queue.close()
        assert [slot.closed for slot in slots] == [1, 1]

    def test_all_are_closed_also_where_one_fails(self) -> None:
        class Dead(PlainSlot):
            def close(self) -> None:
                super().close()
                raise BackendError("the device is lost")

        slots = [Dead(), PlainSlot(), Dead()]
        with pytest.raises(BackendError, match="lost"):
            SlotQueue(slots).close()
        assert [slot.closed for slot in slots] == [1, 1, 1]

    def test_slots_take_turns_but_one_that_failed_is_next(self) -> None:
        slots = [PlainSlot() for _ in range(3)]
        queue = SlotQueue(slots)
        for expected in (*slots, *slots):
            taken = queue.take()
            assert taken is expected
            queue.give(taken)
        queue.take()
        failed = queue.take()
        queue.give(failed, failed=True)
        assert queue.take() is failed

    def test_who_waits_for_a_slot_hears_that_the_queue_is_closed(self) -> None:
        queue = SlotQueue([PlainSlot()])
        queue.take()
        timer = threading.Timer(0.05, queue.close)
        timer.start()
        began_s = time.monotonic()
        with pytest.raises(BackendError, match="closed"):
            queue.take()
        assert time.monotonic() - began_s < WAIT_S / 2
        timer.join()


class TestSeveralGpus:
    def test_slots_of_different_gpus_follow_each_other(self) -> None:
        built = {0: [PlainSlot(), PlainSlot()], 3: [PlainSlot(), PlainSlot()], 4: [PlainSlot()]}
        found = build_on_each((0, 3, 4), built.__getitem__)
        assert found == [built[0][0], built[3][0], built[4][0], built[0][1], built[3][1]]

    def test_one_that_cannot_be_built_closes_the_others(self) -> None:
        first = [PlainSlot(), PlainSlot()]

        def build(gpu: int) -> list[PlainSlot]:
            if gpu:
                raise BackendError("GPU 1 is gone")
            return first

        with pytest.raises(BackendError, match="GPU 1 is gone"):
            build_on_each((0, 1), build)
        assert all(slot.closed for slot in first)

    def test_a_probe_reaches_the_slot_that_failed(self) -> None:
        """Else the slot of a GPU that works would answer it."""
        good, bad = PlainSlot(), PlainSlot()
        bad.fail = RuntimeError("device-side assert triggered")
        backend = build_backend(good, bad)
        assert len(backend.infer(build_tiles(2))) == 2
        for _ in range(3):
            with pytest.raises(BackendError, match="device-side assert triggered"):
                backend.infer(build_tiles(1))
        assert good.batches == [2]

    def test_a_reason_names_several_gpus(self) -> None:
        assert describe_gpus(BackendOptions()) == ""
        assert describe_gpus(BackendOptions(gpus=(0, 2))) == " on GPUs 0, 2"


class TestBackend:
    def test_it_has_as_many_calls_at_once_as_slots(self) -> None:
        slots = [PlainSlot(), PlainSlot()]
        backend = build_backend(*slots)
        assert backend.concurrency == 2 and backend.upgrade is None
        for slot in slots:
            slot.go.clear()
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(backend.infer, build_tiles(1)) for _ in range(2)]
            assert all(slot.inside.wait(20) for slot in slots)
            for slot in slots:
                slot.go.set()
            assert [len(call.result()) for call in calls] == [1, 1]

    def test_a_batch_that_is_too_large_is_cut(self) -> None:
        slot = PlainSlot()
        found = build_backend(slot, max_batch=3).infer(build_tiles(8))
        assert [int(candidates.labels[0]) for candidates in found] == [3] * 6 + [2] * 2
        assert slot.batches == [3, 3, 2]
        assert len(build_backend(slot).infer(build_tiles(8))) == 8
        assert slot.batches[-1] == 8
        assert list(build_backend(slot).infer([])) == []

    def test_errors_become_the_backends_and_the_slot_comes_back(self) -> None:
        slot = PlainSlot()
        backend = build_backend(slot)
        slot.fail = RuntimeError("out of memory")
        for _ in range(3):
            with pytest.raises(
                BackendError, match=r"plain failed on images \(2, 8, 8, 3\): out of memory"
            ):
                backend.infer(build_tiles(2))
        with pytest.raises(BackendError, match=r"plain failed on images \(1, 8, 8, 3\): out of"):
            backend.infer(build_tiles(1))
        slot.fail = BackendError("as it is")
        with pytest.raises(BackendError, match=r"^as it is$"):
            backend.infer(build_tiles(2))
        slot.fail = None
        assert len(backend.infer(build_tiles(2))) == 2

    def test_close_leaves_calls_in_flight_alone(self) -> None:
        slot = PlainSlot()
        slot.go.clear()
        backend = build_backend(slot)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(backend.infer, build_tiles(1))
            assert slot.inside.wait(20)
            backend.close()
            with pytest.raises(BackendError, match="closed"):
                backend.infer(build_tiles(1))
            assert slot.closed == 0
            slot.go.set()
            assert len(call.result()) == 1
        assert slot.closed == 1
        backend.close()
        assert slot.closed == 1

    def test_an_interrupt_reaches_every_slot(self) -> None:
        slots = [PlainSlot(), PlainSlot()]
        backend = build_backend(*slots)
        assert isinstance(backend, Interruptible)
        backend.close()
        backend.interrupt()
        assert [slot.interrupted for slot in slots] == [1, 1]


def graph(slots: int) -> Callable[[UInt8, Int64], list[np.ndarray]]:
    """As many of three candidates as the first pixel says."""

    def run(images: UInt8, valid_hw: Int64) -> list[np.ndarray]:
        batch, height, width, _ = images.shape
        scores = np.zeros((batch, slots), np.float32)
        for row, count in zip(scores, images[:, 0, 0, 0], strict=True):
            row[:count] = np.linspace(0.9, 0.5, count)
        labels = np.tile(np.arange(slots), (batch, 1))
        return [scores, labels, np.ones((batch, slots, height // 4, width // 4), np.float32)]

    return run


class TestHostSlot:
    def test_results_are_views_only_while_half_of_the_slots_are_used(self) -> None:
        slot = HostSlot(graph(4))
        mostly, hardly = slot.infer(build_tiles(1, 3)), slot.infer(build_tiles(1, 1))
        assert [found.mask_hw for found in (*mostly, *hardly)] == [(2, 2)] * 2
        masks = [found.mask_probs for found in (*mostly, *hardly) if isinstance(found, Candidates)]
        assert [len(mask) for mask in masks] == [3, 1]
        assert masks[0].base is not None and masks[1].base is None

    def test_each_canvas_has_a_call_of_its_own(self) -> None:
        run = graph(4)
        calls: list[tuple[int, int]] = []

        def note(images: UInt8, valid_hw: Int64) -> list[np.ndarray]:
            calls.append((len(images), len(valid_hw)))
            return run(images, valid_hw)

        assert len(HostSlot(note).infer(build_tiles(3, 2))) == 3
        assert calls == [(1, 1)] * 3

    def test_another_number_of_results_is_an_error(self) -> None:
        run = graph(4)
        slot = HostSlot(lambda images, valid_hw: run(images.repeat(2, 0), valid_hw.repeat(2, 0)))
        with pytest.raises(BackendError, match="a canvas gave 2 results"):
            slot.infer(build_tiles(1, 1))

    def test_a_closed_slot_has_dropped_its_engine(self) -> None:
        slot = HostSlot(graph(4))
        slot.close()
        slot.interrupt()
        with pytest.raises(BackendError, match="closed"):
            slot.infer(build_tiles(1))


def slot_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "slot"}


class TestThreadSlot:
    def test_all_happens_in_one_thread_of_its_own(self) -> None:
        inner = PlainSlot()
        built: list[str] = []

        def build() -> PlainSlot:
            built.append(threading.current_thread().name)
            return inner

        before = slot_threads()
        slot = ThreadSlot(build)
        for _ in range(2):
            assert len(slot.infer(build_tiles(2))) == 2
        (own,) = slot_threads() - before
        assert own.daemon  # one that hangs ends with the process
        inner.fail = ValueError("not this")
        with pytest.raises(ValueError, match="not this"):
            slot.infer(build_tiles(1))
        slot.interrupt()
        slot.close()
        assert {*built, *inner.threads} == {"slot"}
        assert (inner.interrupted, inner.closed) == (1, 1)
        wait_for(lambda: not slot_threads() - before)

    def test_a_slot_that_cannot_be_built_raises_the_reason_and_leaves_no_thread(self) -> None:
        def fail() -> PlainSlot:
            raise BackendError("no such stream")

        before = slot_threads()
        with pytest.raises(BackendError, match="no such stream"):
            ThreadSlot(fail)
        wait_for(lambda: not slot_threads() - before)

    def test_results_are_not_kept_until_the_next_call(self) -> None:
        """They may hold memory of a device."""
        inner = PlainSlot()
        slot = ThreadSlot(lambda: inner)
        gone = threading.Event()

        class Result(list[TileCandidates]):
            def __del__(self) -> None:
                gone.set()

        inner.infer = lambda tiles: Result()  # type: ignore[method-assign]
        slot.infer(build_tiles(1))
        assert gone.wait(20)
        slot.close()
