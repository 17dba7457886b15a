from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pipeline.types import Candidates, Tile, Window
from service.engines.base import BackendError
from service.engines.ort_slots import BoundSlot, GraphLayout, HostSlot, Outputs
from tests.support.blob_model import POISON, build_graph, build_typed_graph
from tests.support.fake_gpu import CudaPostprocessor, DeviceBatch, HostMemory

CANVAS = (64, 96)


def build_tiles(count: int, canvas_hw: tuple[int, int] = CANVAS, seed: int = 1) -> list[Tile]:
    height, width = canvas_hw
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    window = Window(0, 0, height, width)
    return [Tile(image, (height, width - 8 * (i % 3)), window) for i, image in enumerate(images)]


class Rig:
    """A slot on the host, and what became of it."""

    def __init__(
        self,
        graph: bytes | None = None,
        mask_type: str = "float32",
        candidates: int = 3,
        **slot: Any,
    ) -> None:
        self.memory = HostMemory()
        self.processor = CudaPostprocessor(None, 4)
        self.streams: list[int] = []
        self.threads: set[str] = set()
        self.fail: Exception | None = None
        self.session = ort.InferenceSession(
            graph or build_graph(), providers=["CPUExecutionProvider"]
        )
        layout = GraphLayout(candidates=candidates, mask_stride=4, mask_type=mask_type)
        self.slot = BoundSlot(
            build_memory=lambda: self.memory,
            build_session=self._build_session,
            read_layout=lambda session: layout,
            select=self._select,
            **{"sizes": (1, 2, 4), **slot},
        )

    def _build_session(self, stream: int) -> ort.InferenceSession:
        self.streams.append(stream)
        self.threads.add(threading.current_thread().name)
        return self.session

    def _select(self, outputs: Outputs, stream: int) -> list[Any]:
        self.threads.add(threading.current_thread().name)
        if self.fail is not None:
            raise self.fail
        batch = DeviceBatch(
            scores=outputs.scores,
            labels=outputs.labels,
            mask_probs=outputs.mask_probs,
            mask_type=outputs.layout.mask_type,
            batch=outputs.batch,
            candidates=outputs.layout.candidates,
            mask_hw=outputs.mask_hw,
            release=outputs.release,
        )
        return self.processor.select(batch, stream)


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert isinstance(one, Candidates)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-6)
        assert one.labels.tolist() == other.labels.tolist()
        np.testing.assert_allclose(one.mask_probs, other.mask_probs, atol=tolerance)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_bound_memory_gives_what_plain_calls_give(count: int) -> None:
    """Padding (3 of 4), exact sizes and batches that are cut (5, 9)."""
    rig, tiles = Rig(), build_tiles(count)
    assert_same(rig.slot.infer(tiles), HostSlot(rig.session).infer(tiles))


def test_canvases_of_any_size_share_the_memory_as_far_as_it_goes() -> None:
    rig = Rig(sizes=(1, 2))
    for canvas_hw in ((64, 96), (32, 32), (96, 64), (128, 160), (64, 64)):
        tiles = build_tiles(2, canvas_hw, seed=canvas_hw[1])
        assert_same(rig.slot.infer(tiles), HostSlot(rig.session).infer(tiles))
    assert len(rig.memory.staged) == 2  # the first, and one for the largest
    assert len(rig.memory.allocated) == 2


def test_padding_does_not_see_the_batch_before() -> None:
    rig, tiles = Rig(build_graph(poisonable=True)), build_tiles(4)
    for tile in tiles:
        tile.image[0, 0, 0] = 0
    rig.slot.infer(tiles)
    assert_same(rig.slot.infer(tiles[:3]), HostSlot(rig.session).infer(tiles[:3]))


@pytest.mark.parametrize(
    ("mask_type", "onnx_type", "tolerance"),
    [("float16", onnx.TensorProto.FLOAT16, 1e-3), ("bfloat16", onnx.TensorProto.BFLOAT16, 4e-3)],
)
def test_masks_of_half_size(mask_type: str, onnx_type: int, tolerance: float) -> None:
    rig, tiles = Rig(build_typed_graph(onnx_type), mask_type), build_tiles(2)
    plain = HostSlot(ort.InferenceSession(build_graph(), providers=["CPUExecutionProvider"]))
    assert_same(rig.slot.infer(tiles), plain.infer(tiles), tolerance)


def test_everything_runs_in_the_slots_thread_on_its_stream() -> None:
    rig = Rig()
    rig.slot.infer(build_tiles(2))
    assert rig.streams == rig.processor.streams == [HostMemory.stream]
    assert len(rig.threads) == 1
    assert threading.current_thread().name not in rig.threads


def test_outputs_that_are_held_are_not_written_again() -> None:
    rig = Rig()
    rig.processor.held = []
    batches = [build_tiles(2, seed=seed) for seed in range(4)]
    for tiles in batches:
        assert_same(rig.slot.infer(tiles), HostSlot(rig.session).infer(tiles))
    regions = [region.pointer for region in rig.memory.allocated]
    assert len(set(regions)) == 4
    for release in rig.processor.held * 2:  # twice does no harm
        release()
    for tiles in batches:
        rig.slot.infer(tiles)
    assert len(rig.memory.allocated) == 6  # two were kept, two more are held now


def test_a_failure_gives_the_memory_back() -> None:
    rig, tiles = Rig(), build_tiles(2)
    rig.fail = ValueError("no kernel")
    for _ in range(3):
        with pytest.raises(ValueError, match="no kernel"):
            rig.slot.infer(tiles)
    rig.fail = None
    assert_same(rig.slot.infer(tiles), HostSlot(rig.session).infer(tiles))
    assert len(rig.memory.allocated) == 1


def test_a_graph_that_does_not_fit_its_layout_is_an_error_and_no_garbage() -> None:
    rig = Rig(candidates=2)
    tile = build_tiles(1, (64, 64))[0]
    with pytest.raises(Exception, match="invalid dimensions for output: scores"):
        rig.slot.infer([tile])


def record_run_options(monkeypatch: pytest.MonkeyPatch, rig: Rig) -> list[dict[str, str]]:
    seen: list[dict[str, str]] = []

    class RunOptions:
        def __init__(self) -> None:
            seen.append({})

        def add_run_config_entry(self, key: str, value: str) -> None:
            seen[-1][key] = value

    run = rig.session.run_with_iobinding
    monkeypatch.setattr(rig.session, "run_with_iobinding", lambda binding, options: run(binding))
    monkeypatch.setattr("service.engines.ort_slots.ort.RunOptions", RunOptions)
    return seen


def test_each_size_and_buffer_has_a_cuda_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(fixed_canvas_hw=CANVAS, cuda_graph=True)
    seen = record_run_options(monkeypatch, rig)
    rig.processor.held = []
    for count in (1, 1, 1):
        rig.slot.infer(build_tiles(count))
    assert [options["gpu_graph_id"] for options in seen] == ["1", "4", "-1"]
    for release in rig.processor.held:
        release()
    rig.processor.held = None
    seen.clear()
    for count in (3, 2, 4, 1):
        rig.slot.infer(build_tiles(count))
    assert [options["gpu_graph_id"] for options in seen] == ["3", "5", "3", "4"]
    assert {options["disable_synchronize_execution_providers"] for options in seen} == {"1"}


def test_buffers_of_a_fixed_canvas_never_move() -> None:
    rig = Rig(fixed_canvas_hw=CANVAS)
    rig.slot.warm_up()
    rig.slot.infer(build_tiles(9))
    assert len(rig.memory.staged) == 1
    assert len(rig.memory.allocated) == 1


def test_a_closed_slot_says_so() -> None:
    rig = Rig()
    slots: list[HostSlot | BoundSlot] = [rig.slot, HostSlot(rig.session)]
    for slot in slots:
        slot.close()
        with pytest.raises(BackendError, match="closed"):
            slot.infer(build_tiles(1))


def test_a_slot_that_cannot_be_built_raises_the_reason() -> None:
    def fail(stream: int) -> ort.InferenceSession:
        raise BackendError("no such stream")

    build: Callable[..., BoundSlot] = BoundSlot
    with pytest.raises(BackendError, match="no such stream"):
        build(
            build_memory=HostMemory,
            build_session=fail,
            read_layout=None,
            select=None,
            sizes=(1,),
        )


def test_plain_calls_give_views_only_while_half_of_the_slots_are_used() -> None:
    session = ort.InferenceSession(build_graph(), providers=["CPUExecutionProvider"])
    window = Window(0, 0, 64, 64)
    full = Tile(np.full((64, 64, 3), 255, np.uint8), (64, 64), window)
    dark = Tile(np.zeros((64, 64, 3), np.uint8), (64, 64), window)
    dark.image[:8, :8, 0] = 255
    mostly, hardly = HostSlot(session).infer([full]), HostSlot(session).infer([dark] * 2)
    assert mostly[0].mask_probs.shape == (3, 16, 16)
    assert mostly[0].mask_probs.base is not None
    assert [found.mask_probs.shape for found in hardly] == [(1, 16, 16)] * 2
    assert all(found.mask_probs.base is None for found in hardly)


def test_an_engine_that_fails_on_one_canvas_fails_on_its_batch() -> None:
    rig, tiles = Rig(build_graph(poisonable=True)), build_tiles(2)
    tiles[1].image[0, 0, 0] = POISON
    with pytest.raises(Exception, match="Gather"):
        rig.slot.infer(tiles)
