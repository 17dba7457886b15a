"""Target assignment: the objects and masks of the grid cells (paper, section 3.3).

Symbols: N objects of one image, C classes, S grid, P positive cells, h w mask of a level.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.contour import draw_contour
from training.configs.schema import HeadConfig, TargetConfig
from training.cropped_masks import CroppedMasks, crop_masks

UInt8 = NDArray[np.uint8]


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

    masks: UInt8 | CroppedMasks[np.uint8]
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
        masks: M masks [h, w] float32 in 0..1, one per object with a positive cell.
        exhaustive: As in `Objects`; elsewhere the absence of a class from a cell is not known.
    """

    labels: NDArray[np.int64]
    cells: NDArray[np.int64]
    mask_index: NDArray[np.int64]
    masks: NDArray[np.float32] | CroppedMasks[np.float32]
    exhaustive: NDArray[np.bool_] | None = None


def centre_of_mass(mask: UInt8, top: int = 0, left: int = 0) -> tuple[float, float]:
    """Row and column of the centre of mass, px (float32 arithmetic, as published).

    Args:
        mask: [H, W] uint8 0/1.
        top: Row of the mask's first pixel.
        left: Column of the mask's first pixel.

    Raises:
        ValueError: The mask is empty.
    """
    rows = mask.sum(axis=1, dtype=np.int64)
    total = int(rows.sum())
    if total == 0:
        raise ValueError("the mask is empty, it has no centre of mass")
    columns = mask.sum(axis=0, dtype=np.int64)
    y = np.float32((rows * np.arange(top, top + len(rows))).sum()) / np.float32(total)
    x = np.float32((columns * np.arange(left, left + len(columns))).sum()) / np.float32(total)
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
        canvas_hw: Height and width of the padded batch, px, divisible by the strides of the masks;
            the grid covers all of it.
        head: Grids, ranges and mask strides.
        config: Recipe.
        num_classes: C.

    Raises:
        ValueError: The canvas is not divisible by the strides of the masks.
    """
    for stride in head.mask_strides:
        if canvas_hw[0] % stride or canvas_hw[1] % stride:
            raise ValueError(f"the canvas is {canvas_hw}, expected multiples of {stride} px")
    published = config.recipe == "published"
    masks = objects.masks if isinstance(objects.masks, CroppedMasks) else crop_masks(objects.masks)
    spans = objects.boxes_xyxy[:, 2:] - objects.boxes_xyxy[:, :2]
    sizes = np.sqrt(spans[:, 0] * spans[:, 1])
    scale = np.float32(
        config.centre_scale
    )  # float32 as published, so that ties are resolved equally
    regions: list[tuple[float, float, float, float] | None] = []
    for number, (box_w, box_h) in enumerate(spans):
        top, left, pixels = masks.crop(number)
        if not pixels.size:
            regions.append(None)
            continue
        height, width = (box_h, box_w) if published else pixels.shape
        half_h, half_w = (np.float32(0.5) * np.float32(side) * scale for side in (height, width))
        regions.append((*centre_of_mass(pixels, top, left), float(half_h), float(half_w)))
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
        labels = _fill_labels(owner, objects.labels, num_classes)
        level = _level_targets(owner, labels, masks, canvas_hw, stride, config)
        targets.append(replace(level, exhaustive=objects.exhaustive))
    return targets


def _fill_labels(
    owner: NDArray[np.int64], labels: NDArray[np.int64], background: int
) -> NDArray[np.int64]:
    """The label of each cell's object."""
    filled = np.full(owner.shape, background, np.int64)
    filled[owner >= 0] = labels[owner[owner >= 0]]
    return filled


def _level_targets(
    owner: NDArray[np.int64],
    labels: NDArray[np.int64],
    masks: CroppedMasks[np.uint8],
    canvas_hw: tuple[int, int],
    stride: int,
    config: TargetConfig,
) -> LevelTargets:
    cells = np.flatnonzero(owner >= 0)
    used, mask_index = np.unique(owner.reshape(-1)[cells], return_inverse=True)
    small = CroppedMasks((canvas_hw[0] // stride, canvas_hw[1] // stride), np.float32)
    for index in used:
        top, left, window = _aligned(masks.crop(index), stride)
        if config.masks == "region":
            resized = resize_mask(window, stride, config.mask_resize)
        elif config.recipe == "paper":
            resized = resize_mask(draw_contour(window), stride, config.mask_resize)
        else:
            resized = contour_mask(window, stride, config.mask_resize)
        small.append(resized, top // stride, left // stride)
    return LevelTargets(labels, cells, mask_index.astype(np.int64), small)


def _aligned(crop: tuple[int, int, UInt8], stride: int) -> tuple[int, int, UInt8]:
    """A crop extended to whole blocks of `stride` pixels.

    Resizing at `stride` mixes no pixels of two blocks, so the result is that of the whole canvas.
    """
    top, left, pixels = crop
    above, before = top % stride, left % stride
    height, width = (
        -(-(offset + side) // stride) * stride
        for offset, side in zip((above, before), pixels.shape, strict=True)
    )
    window = np.zeros((height, width), np.uint8)
    window[above : above + pixels.shape[0], before : before + pixels.shape[1]] = pixels
    return top - above, left - before, window
