"""NMS of a batch that stayed on the device: `postprocess.select` by kernels/select.cu.

Symbols: B batch, K candidates, h w mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.model_config import MatrixNms, PostprocessSpec
from pipeline.types import Float32, Int64
from service.engines.base import BackendError
from service.engines.kernels.launcher import Launcher
from service.engines.kernels.workspace import Workspace

MaskType = Literal["float32", "float16", "bfloat16"]
ITEM_BYTES: dict[MaskType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
WORDS_PER_THREAD = 32
"""As in select.cu."""


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """A graph's output on the device.

    Attributes:
        scores: Address of [B, K] float32, 0 for an empty slot.
        labels: Address of [B, K] int64.
        mask_probs: Address of [B, K, h, w] of `mask_type`.
        mask_type: How probabilities are stored.
        batch, candidates: B, K.
        mask_hw: h, w.
        release: Called once when the buffers are no longer needed. Any thread may call it, and the
            garbage collector at any point of it, so it must not take a lock.
    """

    scores: int
    labels: int
    mask_probs: int
    mask_type: MaskType
    batch: int
    candidates: int
    mask_hw: tuple[int, int]
    release: Callable[[], None]

    def __post_init__(self) -> None:
        """Refuses sizes that no graph gives.

        Raises:
            BackendError: Names them.
        """
        if min(self.batch, self.candidates, *self.mask_hw) < 1 or self.mask_type not in ITEM_BYTES:
            raise BackendError(
                f"outputs do not fit: {self.batch} x {self.candidates} masks of {self.mask_hw}, "
                f"{self.mask_type}"
            )

    @property
    def mask_bytes(self) -> int:
        """Of one mask."""
        return self.mask_hw[0] * self.mask_hw[1] * ITEM_BYTES[self.mask_type]


@dataclass(frozen=True)
class Selection:
    """Survivors of one image's NMS, best first.

    Attributes:
        scores: [N] after NMS.
        jobs: [N, 5] int32: index of the candidate, and the mask's first and last row, first and
            last column above the threshold.
    """

    scores: Float32
    jobs: NDArray[np.int32]


@dataclass(frozen=True)
class _Layout:
    """Offsets of the results in one buffer, which one copy brings to the host."""

    counts: int
    order: int
    kept: int
    lows: int
    highs: int
    size_bytes: int

    @classmethod
    def of(cls, batch: int, candidates: int) -> _Layout:
        each = 4 * batch * candidates
        counts = 4 * batch
        return cls(0, counts, counts + each, counts + 2 * each, counts + 4 * each,
                   counts + 6 * each)  # fmt: skip


def queue_ranking(
    launcher: Launcher, workspace: Workspace, batch: DeviceBatch, stream: int
) -> None:
    """Queues the copies of scores and labels to the host, for `read_ranking`."""
    total = batch.batch * batch.candidates
    scores, labels = workspace.host("scores", 4 * total), workspace.host("labels", 8 * total)
    launcher.device.copy(scores.pointer, batch.scores, 4 * total, stream)
    launcher.device.copy(labels.pointer, batch.labels, 8 * total, stream)


def read_ranking(workspace: Workspace, batch: DeviceBatch) -> tuple[Float32, Int64]:
    """What `queue_ranking` copied, once the stream has been waited for.

    Returns:
        [B, K] scores and labels of the graph.

    Raises:
        BackendError: Scores are not finite.
    """
    total = batch.batch * batch.candidates
    scores, labels = workspace.host("scores", 4 * total), workspace.host("labels", 8 * total)
    shape = (batch.batch, batch.candidates)
    found = scores.array[: 4 * total].view(np.float32).reshape(shape).copy()
    if not np.isfinite(found).all():
        raise BackendError("scores are not finite")
    return found, labels.array[: 8 * total].view(np.int64).reshape(shape).copy()


def select_batch(
    launcher: Launcher,
    workspace: Workspace,
    batch: DeviceBatch,
    spec: PostprocessSpec,
    stream: int,
) -> list[Selection]:
    """NMS of every image of a batch; waits for the result.

    Args:
        launcher: The device.
        workspace: Scratch memory.
        batch: Outputs that were queued on `stream`.
        spec: Its `compare` must be "masks".
        stream: The engine's.

    Returns:
        One entry an image.
    """
    layout = _Layout.of(batch.batch, batch.candidates)
    results = workspace.device("results", layout.size_bytes)
    host = workspace.host("results", layout.size_bytes)
    _launch_compare(launcher, workspace, batch, spec, results, layout, stream)
    _launch_nms(launcher, workspace, batch, spec, results, layout, stream)
    launcher.device.copy(host.pointer, results, layout.size_bytes, stream)
    launcher.device.synchronize(stream)
    return _read_selections(host.array, layout, batch.batch, batch.candidates)


def _words(batch: DeviceBatch) -> int:
    return -(-batch.mask_hw[0] * batch.mask_hw[1] // 32)


def _launch_compare(
    launcher: Launcher,
    workspace: Workspace,
    batch: DeviceBatch,
    spec: PostprocessSpec,
    results: int,
    layout: _Layout,
    stream: int,
) -> None:
    """Packs masks and finds their areas, boxes and IoU."""
    images, count, words = batch.batch, batch.candidates, _words(batch)
    height, width = batch.mask_hw
    bits = workspace.device("bits", 4 * images * count * words)
    areas = workspace.device("areas", 4 * images * count)
    iou = workspace.device("iou", 4 * images * count * count)
    lows, highs = results + layout.lows, results + layout.highs
    measured = (bits, areas, lows, highs)
    sizes = (count, height * width, words)
    launcher.launch(
        f"pack_bits_{batch.mask_type}",
        (4 * words, count, images),
        (batch.mask_probs, batch.scores, *measured, *sizes, spec.mask_threshold),
        stream,
    )
    launcher.launch(
        "measure_masks",
        (count, -(-words // WORDS_PER_THREAD), images),
        (bits, batch.scores, areas, lows, highs, count, width, words),
        stream,
    )
    launcher.launch(
        "compare_masks",
        (count, count, images),
        (bits, batch.labels, areas, lows, highs, iou, count, width, words),
        stream,
    )


def _launch_nms(
    launcher: Launcher,
    workspace: Workspace,
    batch: DeviceBatch,
    spec: PostprocessSpec,
    results: int,
    layout: _Layout,
    stream: int,
) -> None:
    """Decays or drops scores and ranks the survivors."""
    images, count = batch.batch, batch.candidates
    each = 4 * images * count
    areas = workspace.device("areas", each)
    iou = workspace.device("iou", each * count)
    decayed = workspace.device("decayed", each)
    per_mask = (count, 1, images)
    if isinstance(spec.nms, MatrixNms):
        largest = workspace.device("largest", each)
        gaussian = int(spec.nms.kernel == "gaussian")
        launcher.launch("matrix_compensate", per_mask, (iou, largest, count), stream)
        launcher.launch(
            "matrix_decay",
            per_mask,
            (batch.scores, areas, iou, largest, decayed, count, gaussian, spec.nms.sigma),
            stream,
        )
    else:
        words = -(-count // 32)
        overlaps = workspace.device("overlaps", each * words)
        dropped = workspace.device("dropped", 4 * images * words)
        launcher.launch(
            "mark_overlaps",
            (words, count, images),
            (iou, overlaps, count, spec.nms.iou_threshold),
            stream,
        )
        launcher.launch(
            "greedy_nms",
            (images, 1, 1),
            (batch.scores, areas, overlaps, dropped, decayed, count, images),
            stream,
        )
    found = (results + layout.order, results + layout.kept, results + layout.counts)
    launcher.launch(
        "rank_survivors",
        per_mask,
        (decayed, *found, count, spec.update_threshold),
        stream,
    )


def _read_selections(
    array: NDArray[np.uint8], layout: _Layout, images: int, count: int
) -> list[Selection]:
    def read(offset: int, *shape: int) -> NDArray[np.int32]:
        size_bytes = 4 * int(np.prod(shape))
        return array[offset : offset + size_bytes].view(np.int32).reshape(shape)

    counts, order = read(layout.counts, images), read(layout.order, images, count)
    kept = read(layout.kept, images, count).view(np.float32)
    lows, highs = read(layout.lows, images, count, 2), read(layout.highs, images, count, 2)
    selections = []
    for image in range(images):
        indices = order[image, : counts[image]]
        low, high = lows[image, indices], highs[image, indices]
        columns = (indices, low[:, 0], high[:, 0], low[:, 1], high[:, 1])
        selections.append(Selection(kept[image, : counts[image]].copy(), np.stack(columns, axis=1)))
    return selections
