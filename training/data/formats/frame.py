"""Labels of one picture: polygons and masks, checked, turned as EXIF says, as COCO segmentations.

Symbols: H W height and width px, N points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.decode import open_image
from pipeline.errors import DecodeError
from pipeline.formats.base import turn
from training.data.formats.files import read_bytes
from training.data.records import DatasetError
from training.data.report import shorten

_SWAPPED, _FLIPPED_Y, _FLIPPED_X = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)
"""EXIF orientations, applied in this order."""
_ROUND = 128
"""Vertices of the polygon that stands for an ellipse."""

Polygon = list[float]
Segmentation = list[Polygon] | dict[str, Any]
"""Polygons or RLE as in COCO JSON."""


@dataclass
class LabelNotes:
    """What was left out or changed, counted, with the first place of each kind."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, what: str, where: str) -> None:
        """Counts one more of a kind."""
        count, first = self.found.get(what, (0, where))
        self.found[what] = (count + 1, first)

    def lines(self) -> list[str]:
        """One line for each kind."""
        return [f"{what}: {n} (first: {first})" for what, (n, first) in self.found.items()]


def number(value: Any, where: str) -> float:
    """A finite number.

    Raises:
        DatasetError: It is something else; names the place and the value.
    """
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if isinstance(value, bool) or not math.isfinite(result):
        raise DatasetError(f"{where}: {shorten(value)} is not a finite number")
    return result


@dataclass(frozen=True)
class Frame:
    """The picture as its labels see it, and how that becomes the picture as training sees it.

    Attributes:
        path: The image file.
        height: Of the picture as it was labelled, px.
        width: As height.
        orientation: EXIF orientation still to apply to the labels; 1 for none.
        notes: Where to count what is changed.
    """

    path: Path
    height: int
    width: int
    orientation: int
    notes: LabelNotes

    @property
    def upright_hw(self) -> tuple[int, int]:
        """Height and width as training sees the picture, px."""
        hw = self.height, self.width
        return hw[::-1] if self.orientation in _SWAPPED else hw

    def polygon(self, points: Sequence[Sequence[Any]], where: str) -> Polygon | None:
        """Points [N, 2] px -> x and y alternating; None, and a note, for fewer than three.

        Raises:
            DatasetError: A value is not a number, or is farther outside than the picture is large.
        """
        pairs = [self.point(point, where) for point in points]
        if len(pairs) < 3:
            self.notes.add("polygons of fewer than 3 points left out", where)
            return None
        if any(not (0 <= x <= self.width and 0 <= y <= self.height) for x, y in pairs):
            self.notes.add("objects clipped that reach outside their image", where)
        height, width = self.upright_hw
        turned: Polygon = []
        for x, y in pairs:
            if self.orientation in _SWAPPED:
                x, y = y, x
            turned.append(width - x if self.orientation in _FLIPPED_X else x)
            turned.append(height - y if self.orientation in _FLIPPED_Y else y)
        return turned

    def point(self, point: Any, where: str) -> tuple[float, float]:
        """A point [x, y] that may lie outside, but no farther than the picture is large.

        Raises:
            DatasetError: It is something else.
        """
        if isinstance(point, str) or not isinstance(point, Sequence) or len(point) != 2:
            raise DatasetError(f"{where}: {shorten(point)} is not a point [x, y]")
        x, y = (number(value, where) for value in point)
        far = max(self.height, self.width)
        for value, name, side in ((x, "x", self.width), (y, "y", self.height)):
            if not -far <= value <= side + far:
                raise DatasetError(
                    f"{where}: the coordinate {name} = {value:g} is far outside of the image of "
                    f"{self.width}x{self.height} px"
                )
        return x, y

    def box(self, corners: Sequence[Sequence[Any]], where: str, angle: float = 0) -> Polygon | None:
        """Two opposite corners, turned clockwise by an angle in degrees around the middle."""
        if len(corners) != 2:
            raise DatasetError(f"{where}: a rectangle has {len(corners)} points, not 2")
        (x1, y1), (x2, y2) = (self.point(corner, where) for corner in corners)
        middle = (x1 + x2) / 2, (y1 + y2) / 2
        outline = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
        return self.polygon(_rotate(outline, middle, angle), where)

    def ellipse(
        self, centre: Any, radii: tuple[float, float], where: str, angle: float = 0
    ) -> Polygon | None:
        """A polygon for an ellipse, turned clockwise by an angle in degrees."""
        middle = self.point(centre, where)
        steps = np.linspace(0, 2 * np.pi, _ROUND, endpoint=False)
        outline = np.stack([np.cos(steps) * radii[0], np.sin(steps) * radii[1]], 1) + middle
        return self.polygon(_rotate(outline, middle, angle), where)

    def mask(self, pixels: NDArray[Any], where: str) -> dict[str, Any] | None:
        """A mask [H, W] -> RLE; None, and a note, for an empty one.

        Raises:
            DatasetError: It is not as large as the picture.
        """
        if pixels.shape != (self.height, self.width):
            raise DatasetError(
                f"{where} is {pixels.shape[1]}x{pixels.shape[0]} px, its image {self.path} is "
                f"{self.width}x{self.height} px"
            )
        if not pixels.any():
            self.notes.add("empty masks left out", where)
            return None
        upright = turn((pixels != 0).astype(np.uint8)[..., None], self.orientation)
        return as_json(coco_mask.encode(np.asfortranarray(upright[..., 0])))

    def crop_mask(self, crop: NDArray[Any], x: int, y: int, where: str) -> dict[str, Any] | None:
        """A mask of a part of the picture, whose upper left pixel is x, y -> RLE."""
        height, width = crop.shape
        if x < 0 or y < 0 or x + width > self.width or y + height > self.height:
            raise DatasetError(
                f"{where}: a mask of {width}x{height} px at {x}, {y} reaches outside of the image "
                f"of {self.width}x{self.height} px"
            )
        pixels = np.zeros((self.height, self.width), np.uint8)
        pixels[y : y + height, x : x + width] = crop != 0
        return self.mask(pixels, where)

    def join(self, parts: Sequence[Polygon | dict[str, Any]]) -> Segmentation:
        """The parts of one object -> its segmentation; polygons stay polygons."""
        polygons = [part for part in parts if isinstance(part, list)]
        if len(polygons) == len(parts):
            return polygons
        masks = [part for part in parts if isinstance(part, dict)]
        if len(masks) == 1 and not polygons:
            return masks[0]
        height, width = self.upright_hw
        drawn = coco_mask.frPyObjects(polygons, height, width) if polygons else []
        return as_json(coco_mask.merge([*masks, *drawn]))


def _rotate(points: NDArray[np.float64], middle: tuple[float, float], angle: float) -> list[Any]:
    if not angle:
        return [tuple(point) for point in points.tolist()]
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    turned = (points - middle) @ np.array([[cosine, sine], [-sine, cosine]]) + middle
    return [tuple(point) for point in turned.tolist()]


def as_json(rle: dict[str, Any]) -> dict[str, Any]:
    """Compressed RLE with counts as text."""
    counts = rle["counts"]
    text = counts.decode() if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": text}


def open_frame(
    path: Path, where: str, notes: LabelNotes, labelled_hw: tuple[int, int] | None = None
) -> Frame:
    """Reads the header of a picture.

    Args:
        path: The image file.
        where: The labels, for errors.
        notes: Where to count what is changed.
        labelled_hw: Height and width that the labels state. They say whether the picture was
            labelled as stored or as EXIF turns it; without them it is the latter, as all common
            programs show pictures.

    Raises:
        DatasetError: The file is missing or no image, or its size is another one.
    """
    if not path.is_file():
        raise DatasetError(f"{where}: its image {path} does not exist")
    try:
        image = open_image(read_bytes(path))
    except DecodeError as error:
        raise DatasetError(f"{where}: its image {path}: {error}") from error
    stored, upright = (image.height, image.width), image.upright_hw
    if labelled_hw is None or labelled_hw == upright:
        if image.orientation != 1:
            notes.add(
                "labels taken as drawn on the picture as its EXIF orientation turns it", where
            )
        return Frame(path, *upright, 1, notes)
    if labelled_hw == stored:
        notes.add("labels turned with their picture by its EXIF orientation", where)
        return Frame(path, *stored, image.orientation, notes)
    raise DatasetError(
        f"{where}: the labels are for an image of {labelled_hw[1]}x{labelled_hw[0]} px, {path} is "
        f"{upright[1]}x{upright[0]} px"
    )
