"""The CUDA kernels beside their floors: the bytes that each must move over the copy bandwidth.

Needs a GPU. Aim: NMS and run lengths of 100 masks at 800x1333 in less than 1 ms an image.
NOT RUN ON HARDWARE: there are no results yet.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import repeat
from pipeline.model_config import MatrixNms, PostprocessSpec
from pipeline.postprocess import postprocess_tile
from pipeline.types import Float32, Tile, Window
from service.engines.device import CudaDevice, CudaError, DeviceMemory
from service.engines.kernels.launcher import CudaLauncher
from service.engines.kernels.nvrtc import default_cache, load_cubins
from service.engines.kernels.postprocessor import CudaPostprocessor
from service.engines.kernels.select import ITEM_BYTES, DeviceBatch, MaskType

SPEC = PostprocessSpec(nms=MatrixNms(), update_threshold=0, score_threshold=0)
STRIDE = 4
COPY_BYTES = 1 << 30


def kernels(
    *,
    repeats: Annotated[int, "calls for each number"] = 50,
    copy_bytes: Annotated[int, "of the copy that gives the bandwidth"] = COPY_BYTES,
    batches: Annotated[tuple[int, ...], "images"] = (1, 8, 16),
) -> Report:
    try:
        device = CudaDevice()
    except CudaError as error:
        raise BenchmarkError(f"nothing to measure: {error}") from error
    from cuda.core import Device

    gpu = Device(0)
    capability = gpu.compute_capability
    cubins = load_cubins((capability.major, capability.minor), cache=default_cache())
    launcher = TimedLauncher(device, cubins)
    bytes_s = measure_copy(device, device.open_stream(), repeats, copy_bytes)
    kinds: tuple[MaskType, ...] = ("float32", "float16", "bfloat16")
    cases = [
        measure(
            launcher,
            KernelCase(batch=batch, candidates=500, instances=100, mask_type=kind),
            repeats,
            bytes_s,
        )
        for batch in batches
        for kind in kinds
    ]
    shown = ("batch", "mask_type", "instances", "select_ms_per_image", "both_ms_per_image")
    rows: list[Row] = [{name: case[name] for name in shown} for case in cases]
    times: list[Row] = [
        {
            "batch": case["batch"],
            "kernel": name,
            "ms": ms,
            "floor, ms": case["floors_ms"].get(name, "-"),
        }
        for case in cases
        for name, ms in case["kernels_ms"].items()
    ]
    copy = round(bytes_s / 1e9, 1)
    return Report(
        data={"gpu": gpu.name, "copy_gb_per_s": copy, "cases": cases},
        tables={"ms of an image": rows, "ms of each kernel": times},
        notes=[f"{gpu.name}: copies {copy} GB/s"],
        packages=("cuda-core",),
    )


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """Sizes of a batch; the paper's are 100 masks at 800x1333 px."""

    batch: int
    candidates: int
    instances: int
    mask_type: MaskType
    image_hw: tuple[int, int] = (800, 1333)

    @property
    def mask_hw(self) -> tuple[int, int]:
        """At the stride, of the canvas padded to 32 px."""
        height, width = (-(-size // 32) * 32 // STRIDE for size in self.image_hw)
        return height, width


class TimedLauncher(CudaLauncher):
    """Records an event before and after each kernel while `timing`."""

    timing = False

    def __init__(self, device: CudaDevice, cubins: dict[str, bytes]) -> None:
        super().__init__(device, cubins)
        self._laps: list[tuple[str, Any, Any]] = []

    def launch(
        self, kernel: str, threads: tuple[int, int, int], arguments: Sequence[float], stream: int
    ) -> None:
        if not self.timing:
            super().launch(kernel, threads, arguments, stream)
            return
        queue, options = self.device.stream(stream), self._core.EventOptions(timing_enabled=True)
        before = queue.record(options=options)
        super().launch(kernel, threads, arguments, stream)
        self._laps.append((kernel, before, queue.record(options=options)))

    def take_ms(self) -> dict[str, list[float]]:
        """The recorded times by kernel; all of them must have ended."""
        laps: dict[str, list[float]] = defaultdict(list)
        for kernel, before, after in self._laps:
            laps[kernel].append(after - before)
        self._laps.clear()
        return laps


def draw_masks(case: KernelCase) -> Float32:
    """[K, h, w] ellipses of COCO's sizes with soft borders."""
    rng = np.random.default_rng(0)
    height, width = case.mask_hw
    masks = np.zeros((case.candidates, height, width), np.float32)
    for mask in masks:
        axes = tuple(int(v) for v in np.exp(rng.uniform(np.log(3), np.log(height / 2), 2)))
        centre = int(rng.integers(0, width)), int(rng.integers(0, height))
        cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
        mask[:] = cv2.GaussianBlur(mask, (0, 0), 1.5)
    return masks


def put(device: CudaDevice, array: np.ndarray[Any, Any], stream: int) -> DeviceMemory:
    """A copy on the device, valid as long as the result."""
    host, memory = device.allocate_pinned(array.nbytes), device.allocate(array.nbytes)
    host.array[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    device.copy(memory.pointer, host.pointer, array.nbytes, stream)
    device.synchronize(stream)
    device.free(host)
    return memory


def build_batch(
    device: CudaDevice, case: KernelCase, masks: Float32, stream: int
) -> tuple[DeviceBatch, list[DeviceMemory]]:
    """The same ranked masks of 80 classes for each image; and the memory that holds them."""
    stored: np.ndarray[Any, Any] = masks
    if case.mask_type == "float16":
        stored = masks.astype(np.float16)
    elif case.mask_type == "bfloat16":
        stored = (masks.view(np.uint32) >> 16).astype(np.uint16)
    scores = np.linspace(0.9, 0.1, case.candidates, dtype=np.float32)
    labels = np.random.default_rng(1).integers(0, 80, case.candidates)
    tiled = np.tile(stored, (case.batch, 1, 1))
    memory = [
        put(device, np.tile(scores, case.batch), stream),
        put(device, np.tile(labels, case.batch), stream),
        put(device, tiled, stream),
    ]
    batch = DeviceBatch(
        scores=memory[0].pointer,
        labels=memory[1].pointer,
        mask_probs=memory[2].pointer,
        mask_type=case.mask_type,
        batch=case.batch,
        candidates=case.candidates,
        mask_hw=case.mask_hw,
        release=lambda: None,
    )
    return batch, memory


def median_ms(step: Callable[[], object], repeats: int) -> float:
    """Wall time of a call."""
    return 1e3 * statistics.median(repeat(step, least=repeats))


def measure_copy(device: CudaDevice, stream: int, repeats: int, size_bytes: int) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    memory = device.allocate(size_bytes), device.allocate(size_bytes)

    def copy() -> None:
        device.copy(memory[0].pointer, memory[1].pointer, size_bytes, stream)
        device.synchronize(stream)

    ms = median_ms(copy, repeats)
    for part in memory:
        device.free(part)
    return 2 * size_bytes / (ms / 1e3)


def floors_bytes(case: KernelCase, masks: Float32) -> dict[str, int]:
    """Least bytes that the large kernels move in one pass over the batch, or over one image."""
    height, width = case.mask_hw
    item = ITEM_BYTES[case.mask_type]
    bits = case.batch * case.candidates * -(-height * width // 32) * 4
    above = masks[: case.instances] > SPEC.mask_threshold
    boxes = (above.any(axis=1).sum(axis=1) * above.any(axis=2).sum(axis=1)).sum()
    pairs = case.batch * case.candidates * (case.candidates - 1) // 2 * 4
    return {
        f"pack_bits_{case.mask_type}": case.batch * masks.size * item + bits,
        "measure_masks": bits,
        "compare_masks": bits + pairs,
        "matrix_compensate": pairs,
        "matrix_decay": pairs,
        f"count_edges_{case.mask_type}": int(boxes) * item,
        f"emit_edges_{case.mask_type}": int(boxes) * item,
    }


def measure(
    launcher: TimedLauncher, case: KernelCase, repeats: int, bytes_s: float
) -> dict[str, Any]:
    """Times of a batch: NMS, then each image's run lengths."""
    device = launcher.device
    stream = device.open_stream()
    masks = draw_masks(case)
    batch, memory = build_batch(device, case, masks, stream)
    processor = CudaPostprocessor(SPEC, STRIDE, launcher)
    height, width = (STRIDE * size for size in case.mask_hw)
    window = Window(0, 0, *case.image_hw)
    tile = Tile(np.zeros((height, width, 3), np.uint8), case.image_hw, window)
    candidates = processor.select(batch, stream)[0]

    def paste() -> int:
        most = case.instances
        found = postprocess_tile(tile, candidates, case.image_hw, SPEC, max_instances=most)
        return len(found.instances)

    select_ms = median_ms(lambda: processor.select(batch, stream), repeats)
    paste_ms = median_ms(paste, repeats)
    launcher.timing = True
    for _ in range(repeats):
        processor.select(batch, stream)
        found = paste()
    launcher.timing = False
    kernels = {name: statistics.median(ms) for name, ms in launcher.take_ms().items()}
    floors = {name: 1e3 * size / bytes_s for name, size in floors_bytes(case, masks).items()}
    processor.close()
    for part in memory:
        device.free(part)
    return {
        "batch": case.batch,
        "candidates": case.candidates,
        "instances": found,
        "mask_type": case.mask_type,
        "image_hw": case.image_hw,
        "select_ms_per_image": round(select_ms / case.batch, 4),
        "run_lengths_ms_per_image": round(paste_ms, 4),
        "both_ms_per_image": round(select_ms / case.batch + paste_ms, 4),
        "kernels_ms": {name: round(ms, 5) for name, ms in kernels.items()},
        "floors_ms": {name: round(ms, 5) for name, ms in floors.items()},
    }
