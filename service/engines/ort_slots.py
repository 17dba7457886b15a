"""Slots of ONNX Runtime: what runs one batch at a time, as many slots as batches at once.

Symbols: B batch, K candidates, H W canvas, h w mask at the mask stride.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from pipeline.postprocess import TileCandidates
from pipeline.types import Candidates, Tile, Window
from service.engines.base import BackendError, collate, split_batch
from service.engines.ort_memory import Memory, Region, Staged

OUTPUT_NAMES = ("scores", "labels", "mask_probs")
KEPT_OUTPUTS = 2
"""Output buffers that a slot keeps: one is filled while the other is post-processed."""

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, a type that NumPy does not have
_MASK_TYPES: dict[str, tuple[Any, int]] = {
    "float32": (np.float32, 4),
    "float16": (np.float16, 2),
    "bfloat16": (_BFLOAT16, 2),
}
_ALIGN_BYTES = 256


class Workers:
    """Threads that the end of the process does not wait for, since one may hang for ever."""

    def __init__(self, count: int) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._work = queue.SimpleQueue()
        self._pending: set[Future[Any]] = set()
        names = (f"engine-{index}" for index in range(count))
        self._threads = [threading.Thread(target=self._run, name=n, daemon=True) for n in names]
        for thread in self._threads:
            thread.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Runs a call in one of the threads."""
        done: Future[Any] = Future()
        self._pending.add(done)
        done.add_done_callback(self._pending.discard)
        self._work.put((done, lambda: function(*arguments)))
        return done

    def stop(self) -> None:
        """Ends the threads when they have done what they are at."""
        for _ in self._threads:
            self._work.put(None)

    def abandon(self, error: BackendError) -> None:
        """Whoever waits for a call waits no longer, also if the call hangs."""
        for done in tuple(self._pending):
            with contextlib.suppress(InvalidStateError):  # it came back in this moment
                done.set_exception(error)

    def join(self, timeout_s: float) -> bool:
        """Waits for the threads that were stopped; whether all have ended."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            done, step = item
            with contextlib.suppress(InvalidStateError):  # it was abandoned
                try:
                    done.set_result(step())
                except Exception as error:
                    done.set_exception(error)
            del item, done, step  # the next batch may be long in coming


class Slot(Protocol):
    """Runs one batch at a time."""

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """See `Backend.infer`."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


class HostSlot:
    """Plain calls: the runtime gives new arrays on the host, and results are views of them.

    Several threads may be in `infer` at once.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session: ort.InferenceSession | None = session
        # Of all calls: what has been interrupted is used no more.
        self._run_options = ort.RunOptions()

    def infer(self, tiles: Sequence[Tile]) -> list[Candidates]:
        """See `Slot.infer`."""
        if self._session is None:
            raise BackendError("the engine is closed")
        images, valid_hw = collate(tiles)
        feeds = {"images": images, "valid_hw": valid_hw}
        outputs = self._session.run(list(OUTPUT_NAMES), feeds, self._run_options)
        if len(outputs[0]) != len(images):
            raise BackendError(f"{len(images)} canvases gave {len(outputs[0])} results")
        return split_batch(*(np.asarray(output) for output in outputs), copy=False)

    def interrupt(self) -> None:
        """Ends calls under way at their next operation."""
        self._run_options.terminate = True

    def close(self) -> None:
        """See `Slot.close`."""
        self._session = None


@dataclass(frozen=True, kw_only=True)
class GraphLayout:
    """What a slot must know of a graph to give it buffers.

    Attributes:
        candidates: K.
        mask_stride: Canvas px per mask px.
        mask_type: "float32", "float16" or "bfloat16".
    """

    candidates: int
    mask_stride: int
    mask_type: str

    def offsets(self, batch: int, canvas_hw: tuple[int, int]) -> tuple[int, int, int, int]:
        """Where scores, labels and masks begin in one region, and its size, bytes."""
        height, width = (side // self.mask_stride for side in canvas_hw)
        slots = batch * self.candidates
        labels = _align(4 * slots)
        masks = labels + _align(8 * slots)
        end = masks + slots * height * width * _MASK_TYPES[self.mask_type][1]
        return 0, labels, masks, end


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """A batch's output where the engine left it.

    Attributes:
        scores, labels, mask_probs: Addresses of [B, K] float32, [B, K] int64 and [B, K, h, w].
        batch: B: canvases that were asked for; the memory behind them is of padding.
        layout: K, the masks' stride and type.
        canvas_hw: H, W.
        release: Gives the memory back to the slot; any thread may call it, more than once too.
    """

    scores: int
    labels: int
    mask_probs: int
    batch: int
    layout: GraphLayout
    canvas_hw: tuple[int, int]
    release: Callable[[], None]

    @property
    def mask_hw(self) -> tuple[int, int]:
        """h, w."""
        height, width = self.canvas_hw
        return height // self.layout.mask_stride, width // self.layout.mask_stride


Select = Callable[[Outputs, int], list[TileCandidates]]
"""Makes candidates of a batch's output, in the order of a stream (its handle)."""


@dataclass(eq=False)
class _OutputBuffer:
    """Memory of one batch's output; `number` None is one too many and not kept."""

    number: int | None
    region: Region


class _Lease:
    """A batch's hold on its buffer; only the first call gives it back."""

    def __init__(self, buffer: _OutputBuffer, give_back: Callable[[_OutputBuffer], None]) -> None:
        self._open = [buffer]
        self._give_back = give_back

    def __call__(self) -> None:
        with contextlib.suppress(IndexError):
            self._give_back(self._open.pop())


class BoundSlot:
    """A session with memory, a stream and a thread of its own; outputs stay with the engine.

    The thread is there because the runtime keeps a recorded CUDA graph for each thread.

    Args:
        build_memory: Called in the slot's thread.
        build_session: Gets the stream's handle; called in the slot's thread.
        select: Makes candidates of outputs; called in the slot's thread.
        read_layout: Of the session's outputs.
        sizes: Batches are padded to the next of these, larger ones are cut; ascending.
        fixed_canvas_hw: H and W if there is one canvas only: its buffers never move then.
        cuda_graph: The session records CUDA graphs.
    """

    def __init__(
        self,
        *,
        build_memory: Callable[[], Memory],
        build_session: Callable[[int], ort.InferenceSession],
        read_layout: Callable[[ort.InferenceSession], GraphLayout],
        select: Select,
        sizes: Sequence[int],
        fixed_canvas_hw: tuple[int, int] | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self._select = select
        self._sizes = tuple(sizes)
        self._fixed_canvas_hw = fixed_canvas_hw
        self._cuda_graph = cuda_graph
        # A result's end gives a buffer back in the middle of anything: no lock, deques are atomic.
        self._free: deque[_OutputBuffer] = deque()
        self._numbers = iter(range(KEPT_OUTPUTS))
        self._inputs: Staged | None = None
        self._thread = Workers(1)
        self._session: ort.InferenceSession | None = None
        try:
            self._thread.run(self._build, build_memory, build_session, read_layout).result()
        except BaseException:
            self._thread.stop()
            raise

    def _build(
        self,
        build_memory: Callable[[], Memory],
        build_session: Callable[[int], ort.InferenceSession],
        read_layout: Callable[[ort.InferenceSession], GraphLayout],
    ) -> None:
        self._memory = build_memory()
        self._session = build_session(self._memory.stream)
        self._layout = read_layout(self._session)

    def infer(self, tiles: Sequence[Tile]) -> list[TileCandidates]:
        """See `Slot.infer`."""
        found: list[TileCandidates] = []
        for start in range(0, len(tiles), self._sizes[-1]):
            part = tiles[start : start + self._sizes[-1]]
            call = self._thread.run(self._infer, part)
            if self._session is None:  # nobody runs it any more
                raise BackendError("the engine is closed")
            found += call.result()
        return found

    def warm_up(self) -> None:
        """Runs each batch size once with each of the kept buffers; needs a fixed canvas."""
        assert self._fixed_canvas_hw is not None
        height, width = self._fixed_canvas_hw
        image = np.full((height, width, 3), 128, np.uint8)
        tile = Tile(image, (height, width), Window(0, 0, height, width))
        for size in self._sizes:
            held = [self.infer([tile] * size) for _ in range(KEPT_OUTPUTS)]
            held.clear()

    def close(self) -> None:
        """See `Slot.close`."""
        self._session = None
        self._thread.stop()
        self._thread.abandon(BackendError("the engine is closed"))

    def _infer(self, tiles: Sequence[Tile]) -> list[TileCandidates]:
        session = self._session
        if session is None:
            raise BackendError("the engine is closed")
        canvas_hw = (tiles[0].image.shape[0], tiles[0].image.shape[1])
        size = next(size for size in self._sizes if size >= len(tiles))
        buffer = self._take(size, canvas_hw)
        outputs = self._describe_outputs(buffer, size, len(tiles), canvas_hw)
        try:
            binding = session.io_binding()
            self._bind_inputs(binding, tiles, size, canvas_hw)
            self._bind_outputs(binding, outputs, size)
            session.run_with_iobinding(binding, self._run_options(size, buffer))
            return self._select(outputs, self._memory.stream)
        except BaseException:
            outputs.release()
            raise

    def _bind_inputs(
        self, binding: Any, tiles: Sequence[Tile], size: int, canvas_hw: tuple[int, int]
    ) -> None:
        """Fills one pinned region: `valid_hw` and then `images`, so that one copy is enough."""
        start = _align(16 * self._sizes[-1])
        reserved, frame = size, 3 * canvas_hw[0] * canvas_hw[1]
        if self._fixed_canvas_hw is not None:
            reserved = self._sizes[-1]
        if self._inputs is None or self._inputs.n_bytes < start + reserved * frame:
            self._inputs = self._memory.stage(start + reserved * frame)
        inputs = self._inputs
        inputs.wait()
        valid_hw = inputs.array[: 16 * size].view(np.int64).reshape(size, 2)
        valid_hw[:] = canvas_hw  # of padding, whose pixels may be anything
        images = inputs.array[start : start + size * frame].reshape(size, *canvas_hw, 3)
        for row, tile in enumerate(tiles):
            valid_hw[row] = tile.valid_hw
            images[row] = tile.image
        inputs.upload(start + size * frame)
        device = self._memory.device
        shape = (size, *canvas_hw, 3)
        binding.bind_input("valid_hw", device, 0, np.int64, (size, 2), inputs.pointer)
        binding.bind_input("images", device, 0, np.uint8, shape, inputs.pointer + start)

    def _describe_outputs(
        self, buffer: _OutputBuffer, size: int, batch: int, canvas_hw: tuple[int, int]
    ) -> Outputs:
        scores, labels, masks, _ = self._layout.offsets(size, canvas_hw)
        pointer = buffer.region.pointer
        return Outputs(
            scores=pointer + scores,
            labels=pointer + labels,
            mask_probs=pointer + masks,
            batch=batch,
            layout=self._layout,
            canvas_hw=canvas_hw,
            release=_Lease(buffer, self._give_back),
        )

    def _bind_outputs(self, binding: Any, outputs: Outputs, size: int) -> None:
        device, shape = self._memory.device, (size, self._layout.candidates)
        mask_type = _MASK_TYPES[self._layout.mask_type][0]
        masks = (*shape, *outputs.mask_hw)
        binding.bind_output("scores", device, 0, np.float32, shape, outputs.scores)
        binding.bind_output("labels", device, 0, np.int64, shape, outputs.labels)
        binding.bind_output("mask_probs", device, 0, mask_type, masks, outputs.mask_probs)

    def _run_options(self, size: int, buffer: _OutputBuffer) -> ort.RunOptions:
        """Nobody waits for the device here: whoever reads the outputs does, on the same stream."""
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._cuda_graph:
            graph = -1  # a buffer that does not return is not worth a recording
            if buffer.number is not None:
                graph = 1 + buffer.number * len(self._sizes) + self._sizes.index(size)
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _take(self, size: int, canvas_hw: tuple[int, int]) -> _OutputBuffer:
        """A free buffer that is large enough; never waits for one, which could be for ever."""
        needed = self._layout.offsets(size, canvas_hw)[3]
        if self._fixed_canvas_hw is not None:
            needed = self._layout.offsets(self._sizes[-1], self._fixed_canvas_hw)[3]
        try:
            buffer = self._free.popleft()
        except IndexError:
            number = next(self._numbers, None)
        else:
            if buffer.region.n_bytes >= needed:
                return buffer
            number = buffer.number
        return _OutputBuffer(number, self._memory.allocate(needed))

    def _give_back(self, buffer: _OutputBuffer) -> None:
        if buffer.number is not None:
            self._free.append(buffer)


def _align(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
