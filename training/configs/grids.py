"""Which objects get a cell of a grid: a simulation on boxes, without masks or a network.

Symbols: N objects, S grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.model_config import InputSpec, TileResize
from pipeline.preprocess import keep_ratio_size
from training.configs.schema import HeadConfig
from training.configs.statistics import Float, ImageObjects


@dataclass(frozen=True)
class CanvasObjects:
    """Objects of one canvas: its size, centres [N, 2] (x, y) and box sides [N, 2], px."""

    canvas_wh: Float
    centres_xy: Float
    sides_wh: Float

    @property
    def sizes(self) -> Float:
        """Square roots of the box areas, [N] px."""
        return np.sqrt(self.sides_wh[:, 0] * self.sides_wh[:, 1])


def place_objects(image: ImageObjects, spec: InputSpec) -> list[CanvasObjects]:
    """The canvases of an image; an object belongs to the tile that contains its centre."""
    resize = spec.resize
    centres, sides = image.centres_xy, image.boxes_xywh[:, 2:]
    if isinstance(resize, TileResize):
        canvas = np.asarray(resize.canvas_hw[::-1], np.float64)
        tile = np.asarray(resize.tile_hw[::-1], np.float64)
        places, members = np.unique(np.floor(centres / tile), axis=0, return_inverse=True)
        members = members.reshape(-1)
        return [
            CanvasObjects(
                canvas,
                (centres[members == i] - place * tile) * resize.scale,
                np.minimum(sides[members == i] * resize.scale, canvas),
            )
            for i, place in enumerate(places)
        ]
    height, width = keep_ratio_size(image.image_hw, resize.short_side, resize.long_side)
    size, multiple = np.asarray([width, height], np.float64), resize.pad_multiple
    scale = size / np.asarray(image.image_hw[::-1])
    return [CanvasObjects(np.ceil(size / multiple) * multiple, centres * scale, sides * scale)]


def nearest_neighbours(canvas: CanvasObjects, chosen: NDArray[np.bool_]) -> Float:
    """Distance of each chosen object's centre to the nearest other's, as a share of the canvas.

    The larger of the distances along the axes, because two objects share a cell only if they are
    close along both. [M]; empty if fewer than two objects are chosen.
    """
    points = canvas.centres_xy[chosen] / canvas.canvas_wh
    if len(points) < 2:
        return np.empty(0)
    apart = np.abs(points[:, None] - points[None]).max(axis=2)
    np.fill_diagonal(apart, np.inf)
    return np.asarray(apart.min(axis=1), np.float64)


def count_without_cell(canvas: CanvasObjects, head: HeadConfig, centre_scale: float) -> int:
    """Objects that own no cell of any level after the assignment of the published recipe.

    Later objects overwrite earlier ones; here the largest come first, which is the order that
    loses the fewest, so a data set's own order can lose a few more.
    """
    order = np.argsort(-canvas.sizes, kind="stable")
    centres, sides = canvas.centres_xy[order], canvas.sides_wh[order]
    sizes = canvas.sizes[order]
    owned = np.zeros(len(order), np.bool_)
    for grid, (low, high) in zip(head.num_grids, head.scale_ranges, strict=True):
        cells = np.full((grid, grid), -1, np.int64)
        per_px = grid / canvas.canvas_wh
        middle = np.clip(centres * per_px, 0, grid - 1).astype(np.int64)
        half = sides * per_px * centre_scale / 2
        first = np.maximum((centres * per_px - half).astype(np.int64), middle - 1).clip(0)
        last = np.minimum((centres * per_px + half).astype(np.int64), middle + 1).clip(max=grid - 1)
        for i in np.flatnonzero((sizes >= low) & (sizes <= high)):
            (left, top), (right, bottom) = first[i], last[i]
            cells[top : bottom + 1, left : right + 1] = i
        owned[np.unique(cells[cells >= 0])] = True
    return int((~owned).sum())


def share_without_cell(
    canvases: Sequence[CanvasObjects], head: HeadConfig, centre_scale: float
) -> float:
    """Share of the objects of all canvases that own no cell; 0 if there are no objects."""
    total = sum(len(canvas.centres_xy) for canvas in canvases)
    lost = sum(count_without_cell(canvas, head, centre_scale) for canvas in canvases)
    return lost / max(total, 1)
