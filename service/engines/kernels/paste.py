"""Masks on the device become run lengths of the original image: `paste_mask`, `encode_box_mask`.

The kernels are in paste.cu and runs.cu.

Symbols: N masks, H W window in the original, h w mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Tile
from service.engines.kernels.launcher import Launcher
from service.engines.kernels.select import MaskType
from service.engines.kernels.workspace import Workspace

COLUMNS_PER_CHUNK = 32
SLICES = 64
TAP_BYTES = 24
SPAN_BYTES = 16
"""These four as in paste.cu and runs.cu."""
HEAD = np.dtype(
    [(name, np.uint32) for name in ("edge_base", "edges", "byte_base", "bytes", "area")]
    + [(name, np.int32) for name in ("top", "bottom", "left", "right")]
)
CURSORS_BYTES = 16
FRAME_BYTES = 32
FIRST_EDGES = 1 << 16
FIRST_BYTES = 1 << 17


@dataclass(frozen=True)
class PastedMask:
    """A mask of the original image.

    Attributes:
        rle: COCO compressed RLE.
        bbox_xywh: The tight box of its pixels.
        area: Its pixels.
    """

    rle: dict[str, Any]
    bbox_xywh: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class MaskPlane:
    """A tile's masks on the device.

    Attributes:
        pointer: Address of [K, h, w].
        mask_type: How probabilities are stored.
        mask_hw: h, w.
        stride: Canvas px per mask px.
        threshold: A pixel belongs to the mask above this.
    """

    pointer: int
    mask_type: MaskType
    mask_hw: tuple[int, int]
    stride: int
    threshold: float


@dataclass(frozen=True)
class _Buffers:
    """Addresses on the device."""

    frame: int
    jobs: int
    taps: int
    spans: int
    columns: int
    chunks: int
    slices: int
    found: int
    edges: int
    text: int
    edge_capacity: int
    byte_capacity: int

    @property
    def heads(self) -> int:
        """Behind the cursors."""
        return self.found + CURSORS_BYTES


def paste_masks(
    launcher: Launcher,
    workspace: Workspace,
    plane: MaskPlane,
    tile: Tile,
    image_hw: tuple[int, int],
    jobs: NDArray[np.int32],
) -> list[PastedMask | None]:
    """Pastes some masks of a tile; waits for the result.

    Args:
        launcher: The device.
        workspace: Scratch memory; its stream is used.
        plane: The tile's masks, complete.
        tile: Where they came from.
        image_hw: Height and width of the original image.
        jobs: [N, 5] as in `Selection`, N at least 1.

    Returns:
        One entry a job; None for a mask without pixels in the image.
    """
    _upload(launcher, workspace, plane, tile, image_hw, jobs)
    edge_capacity = max(FIRST_EDGES, workspace.device_size("edges") // 4)
    byte_capacity = max(FIRST_BYTES, workspace.device_size("text"))
    found_bytes = CURSORS_BYTES + HEAD.itemsize * len(jobs)
    host = workspace.host("found", found_bytes)
    while True:
        buffers = _reserve(workspace, tile, len(jobs), edge_capacity, byte_capacity)
        _launch_edges(launcher, buffers, plane, tile, len(jobs), workspace.stream)
        _launch_runs(launcher, buffers, image_hw, len(jobs), workspace.stream)
        launcher.device.copy(host.pointer, buffers.found, found_bytes, workspace.stream)
        launcher.device.synchronize(workspace.stream)
        edges, text_bytes = (int(v) for v in host.array[:8].view(np.uint32))
        if edges <= edge_capacity and text_bytes <= byte_capacity:
            break
        edge_capacity, byte_capacity = max(edges, edge_capacity), max(text_bytes, byte_capacity)
    text = b""
    if text_bytes:
        target = workspace.host("text", text_bytes)
        launcher.device.copy(target.pointer, buffers.text, text_bytes, workspace.stream)
        launcher.device.synchronize(workspace.stream)
        text = target.array[:text_bytes].tobytes()
    heads = host.array[CURSORS_BYTES:found_bytes].view(HEAD)
    return [_read_mask(head, text, image_hw) for head in heads.tolist()]


def _upload(
    launcher: Launcher,
    workspace: Workspace,
    plane: MaskPlane,
    tile: Tile,
    image_hw: tuple[int, int],
    jobs: NDArray[np.int32],
) -> None:
    window = tile.window
    frame = (*plane.mask_hw, window.y, window.x, window.height, window.width, *image_hw)
    size_bytes = FRAME_BYTES + jobs.nbytes
    host = workspace.host("jobs", size_bytes)
    host.array[:FRAME_BYTES] = np.array(frame, np.int32).view(np.uint8)
    host.array[FRAME_BYTES:size_bytes] = np.ascontiguousarray(jobs).view(np.uint8).reshape(-1)
    target = workspace.device("jobs", size_bytes)
    launcher.device.copy(target, host.pointer, size_bytes, workspace.stream)


def _reserve(
    workspace: Workspace, tile: Tile, count: int, edge_capacity: int, byte_capacity: int
) -> _Buffers:
    height, width = tile.window.height, tile.window.width
    jobs = workspace.device("jobs", FRAME_BYTES)
    return _Buffers(
        frame=jobs,
        jobs=jobs + FRAME_BYTES,
        taps=workspace.device("taps", TAP_BYTES * (height + width)),
        spans=workspace.device("spans", SPAN_BYTES * count),
        columns=workspace.device("columns", 4 * count * width),
        chunks=workspace.device("chunks", 4 * count * -(-width // COLUMNS_PER_CHUNK)),
        slices=workspace.device("slices", 4 * count * SLICES),
        found=workspace.device("found", CURSORS_BYTES + HEAD.itemsize * count),
        edges=workspace.device("edges", 4 * edge_capacity),
        text=workspace.device("text", byte_capacity),
        edge_capacity=edge_capacity,
        byte_capacity=byte_capacity,
    )


def _launch_edges(
    launcher: Launcher,
    buffers: _Buffers,
    plane: MaskPlane,
    tile: Tile,
    count: int,
    stream: int,
) -> None:
    """Counts the edges of each mask's columns, finds their places and writes them."""
    height, width = tile.window.height, tile.window.width
    b = buffers
    launcher.launch(
        "axis_taps",
        (height + width, 1, 1),
        (b.taps, *plane.mask_hw, plane.stride, *tile.valid_hw, height, width),
        stream,
    )
    launcher.launch(
        "paste_spans",
        (count, 1, 1),
        (b.taps, b.jobs, b.spans, b.heads, b.found, count, height, width),
        stream,
    )
    masks = (plane.pointer, b.jobs, b.taps, b.spans, b.columns)
    launcher.launch(
        f"count_edges_{plane.mask_type}",
        (width, count, 1),
        (*masks, b.frame, plane.threshold),
        stream,
    )
    chunks = -(-width // COLUMNS_PER_CHUNK)
    launcher.launch(
        "sum_columns", (chunks, count, 1), (b.columns, b.spans, b.chunks, width), stream
    )
    launcher.launch(
        "place_edges", (count, 1, 1), (b.chunks, b.heads, b.found, count, width), stream
    )
    launcher.launch(
        f"emit_edges_{plane.mask_type}",
        (width, count, 1),
        (*masks, b.chunks, b.heads, b.edges, b.frame, plane.threshold, b.edge_capacity),
        stream,
    )


def _launch_runs(
    launcher: Launcher, buffers: _Buffers, image_hw: tuple[int, int], count: int, stream: int
) -> None:
    """Compresses the runs between the edges."""
    b = buffers
    launcher.launch(
        "measure_runs",
        (SLICES, count, 1),
        (b.edges, b.heads, b.slices, *image_hw, b.edge_capacity),
        stream,
    )
    launcher.launch("place_bytes", (count, 1, 1), (b.slices, b.heads, b.found, count), stream)
    launcher.launch(
        "write_runs",
        (SLICES, count, 1),
        (b.edges, b.heads, b.slices, b.text, *image_hw, b.byte_capacity),
        stream,
    )


def _read_mask(head: tuple[int, ...], text: bytes, image_hw: tuple[int, int]) -> PastedMask | None:
    _, edges, byte_base, size_bytes, area, top, bottom, left, right = head
    if edges == 0:
        return None
    rle = {"size": list(image_hw), "counts": text[byte_base : byte_base + size_bytes]}
    return PastedMask(rle, (left, top, right - left + 1, bottom - top + 1), area)
