"""Target assignment: the objects and masks of the grid cells (paper, section 3.3).

Symbols: N objects of one image, C classes, S grid, P positive cells, h w mask of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex, overload

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.contour import draw_contour
from training.configs.schema import HeadConfig, TargetConfig

UInt8 = NDArray[np.uint8]


class CroppedMasks(Sequence[UInt8]):
    """Masks of one size, of which only the pixels in their boxes are kept.

    Args:
        hw: Height and width of the masks, px.
    """

    def __init__(self, hw: tuple[int, int]) -> None:
        self.hw = hw
        self._crops: list[tuple[int, int, UInt8]] = []

    def append(self, mask: UInt8) -> tuple[int, int, int, int]:
        """Adds a mask that is not empty; returns its box x, y, width, height."""
        x, y, width, height = cv2.boundingRect(mask)
        self._crops.append((y, x, mask[y : y + height, x : x + width].copy()))
        return x, y, width, height

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number, height and width of the masks."""
        return len(self), *self.hw

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels that are kept."""
        return sum(pixels.nbytes for _, _, pixels in self._crops)

    def __len__(self) -> int:
        return len(self._crops)

    @overload
    def __getitem__(self, index: SupportsIndex) -> UInt8: ...

    @overload
    def __getitem__(self, index: slice) -> list[UInt8]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> UInt8 | list[UInt8]:
        """A whole mask [H, W], made anew each time."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        top, left, pixels = self._crops[index]
        mask = np.zeros(self.hw, np.uint8)
        mask[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return mask


@dataclass(frozen=True)
class Objects:
    """Ground truth of one canvas.

    Attributes:
        masks: N masks [H, W] uint8 0/1; H, W is the size of the image on the canvas or of the
            canvas.
        boxes_xyxy: [N, 4] float32, px.
        labels: [N] int64, 0..C-1.
        exhaustive: [C], whether all objects of a class are labelled; None: those of all classes.
    """

    masks: UInt8 | CroppedMasks
    boxes_xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]
    exhaustive: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class LevelTargets:
    """Targets of one image at one level.

    Attributes:
        labels: [S, S] int64; C is the background.
        cells: [P] int64, i * S + j of the positive cells, ascending.
        mask_index: [P] int64, row in `masks` of each positive cell.
        masks: [M, h, w] float32 in 0..1, one row per object with a positive cell.
        exhaustive: As in `Objects`; elsewhere the absence of a class from a cell is not known.
    """

    labels: NDArray[np.int64]
    cells: NDArray[np.int64]
    mask_index: NDArray[np.int64]
    masks: NDArray[np.float32]
    exhaustive: NDArray[np.bool_] | None = None


def centre_of_mass(mask: UInt8) -> tuple[float, float]:
    """Row and column of the centre of mass, px (float32 arithmetic, as published).

    Raises:
        ValueError: The mask is empty.
    """
    left, top, width, height = cv2.boundingRect(mask)
    inside = mask[top : top + height, left : left + width]
    rows = inside.sum(axis=1, dtype=np.int64)
    total = int(rows.sum())
    if total == 0:
        raise ValueError("the mask is empty, it has no centre of mass")
    columns = inside.sum(axis=0, dtype=np.int64)
    y = np.float32((rows * np.arange(top, top + height)).sum()) / np.float32(total)
    x = np.float32((columns * np.arange(left, left + width)).sum()) / np.float32(total)
    return float(y), float(x)


def grid_cell(position: float, size: int, grid: int) -> int:
    """Index of the cell of a position: trunc(float32(p / size) / float32(1 / S)).

    The arithmetic of the published code; other rounding gives other cells at cell borders.
    """
    return int(np.float32(np.float32(position) / np.float32(size)) / np.float32(1.0 / grid))


def resize_mask(mask: UInt8, stride: int, method: str = "bilinear") -> NDArray[np.float32]:
    """A mask at `stride`: [H, W] uint8 -> [int(H / stride + 0.5), int(W / stride + 0.5)].

    Args:
        mask: [H, W] uint8 0/1.
        stride: Factor by which the mask is reduced.
        method: `bilinear` on uint8 as published (values are 0 or 1), `area`: the covered fraction.
    """
    height, width = (int(side / stride + 0.5) for side in mask.shape)
    if method == "bilinear":
        small = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)
        return small.astype(np.float32)
    small = cv2.resize(mask * np.uint8(255), (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32) / np.float32(255)


def contour_mask(mask: UInt8, stride: int, method: str = "bilinear") -> NDArray[np.float32]:
    """An object's closed contour at `stride`: [H, W] -> as `resize_mask`, 0 or 1.

    Not the paper's order (section 6), which is `resize_mask(draw_contour(mask))`. Here the
    mask is resized first, and its contour is then drawn one mask pixel wide, so that the curve is
    closed. A contour drawn on the canvas would be a quarter of a pixel wide at stride 4, and
    resizing would leave isolated pixels of it or none. A pixel is inside if at least half of it is
    covered; if no pixel is, every pixel that the object touches is inside.

    Args:
        mask: [H, W] uint8 0/1, not empty.
        stride: Factor by which the mask is reduced.
        method: As in `resize_mask`.
    """
    inside = resize_mask(mask, stride, method) >= 0.5
    if not inside.any():
        inside = resize_mask(mask, stride, "area") > 0
    return draw_contour(inside.astype(np.uint8)).astype(np.float32)


def _cell_range(
    centre: float, extent: float, size: int, grid: int, clamp_to_neighbours: bool
) -> tuple[int, int]:
    """First and last cell of the centre region along one axis."""
    cell = grid_cell(centre, size, grid)
    middle, half = np.float32(centre), np.float32(extent)
    first = max(0, grid_cell(float(middle - half), size, grid))
    last = min(grid - 1, grid_cell(float(middle + half), size, grid))
    if clamp_to_neighbours:
        first, last = max(first, cell - 1), min(last, cell + 1)
    return first, last


def _extent(mask: UInt8) -> tuple[int, int]:
    """Height and width of a mask's bounding box, px."""
    _, _, width, height = cv2.boundingRect(mask)
    return height, width


def assign_targets(
    objects: Objects,
    canvas_hw: tuple[int, int],
    head: HeadConfig,
    config: TargetConfig,
    num_classes: int,
) -> list[LevelTargets]:
    """Targets of one image, one `LevelTargets` per level.

    An object is assigned to every level whose range contains sqrt(box area), bounds inclusive. The
    cells in its centre region are positive, a later object overwrites an earlier one, and objects
    without pixels are skipped.

    Args:
        objects: Ground truth, possibly without objects.
        canvas_hw: Height and width of the padded batch, px; the grid covers all of it.
        head: Grids, ranges and mask strides.
        config: Recipe.
        num_classes: C.
    """
    published = config.recipe == "published"
    spans = objects.boxes_xyxy[:, 2:] - objects.boxes_xyxy[:, :2]
    sizes = np.sqrt(spans[:, 0] * spans[:, 1])
    scale = np.float32(
        config.centre_scale
    )  # float32 as published, so that ties are resolved equally
    regions: list[tuple[float, float, float, float] | None] = []
    for mask, (box_w, box_h) in zip(objects.masks, spans, strict=True):
        if not mask.any():
            regions.append(None)
            continue
        height, width = (box_h, box_w) if published else _extent(mask)
        half_h, half_w = (np.float32(0.5) * np.float32(side) * scale for side in (height, width))
        regions.append((*centre_of_mass(mask), float(half_h), float(half_w)))
    targets = []
    for grid, stride, (low, high) in zip(
        head.num_grids, head.mask_strides, head.scale_ranges, strict=True
    ):
        owner = np.full((grid, grid), -1, np.int64)
        for index in np.flatnonzero((sizes >= low) & (sizes <= high)):
            region = regions[index]
            if region is None:
                continue
            y, x, extent_y, extent_x = region
            top, bottom = _cell_range(y, extent_y, canvas_hw[0], grid, published)
            left, right = _cell_range(x, extent_x, canvas_hw[1], grid, published)
            owner[top : bottom + 1, left : right + 1] = index
        targets.append(_level_targets(owner, objects, canvas_hw, stride, config, num_classes))
    return targets


def _pad(mask: UInt8, canvas_hw: tuple[int, int]) -> UInt8:
    """Pads a mask to the canvas with zeros at the bottom and on the right."""
    if mask.shape == canvas_hw:
        return mask
    padded = np.zeros(canvas_hw, np.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded


def _level_targets(
    owner: NDArray[np.int64],
    objects: Objects,
    canvas_hw: tuple[int, int],
    stride: int,
    config: TargetConfig,
    num_classes: int,
) -> LevelTargets:
    cells = np.flatnonzero(owner >= 0)
    used, mask_index = np.unique(owner.reshape(-1)[cells], return_inverse=True)
    labels = np.full(owner.shape, num_classes, np.int64)
    labels.reshape(-1)[cells] = objects.labels[used][mask_index]
    mask_hw = (canvas_hw[0] // stride, canvas_hw[1] // stride)
    masks = np.zeros((len(used), *mask_hw), np.float32)
    for row, index in enumerate(used):
        mask = _pad(objects.masks[index], canvas_hw)
        if config.masks == "region":
            small = resize_mask(mask, stride, config.mask_resize)
        elif config.recipe == "paper":
            small = resize_mask(draw_contour(mask), stride, config.mask_resize)
        else:
            small = contour_mask(mask, stride, config.mask_resize)
        masks[row, : small.shape[0], : small.shape[1]] = small[: mask_hw[0], : mask_hw[1]]
    index = mask_index.astype(np.int64)
    return LevelTargets(labels, cells, index, masks, objects.exhaustive)
