"""Validated images and objects of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Polygons = tuple[NDArray[np.float64], ...]
"""The polygons of an object; x and y alternate, px."""
ImageId = int | str


class DatasetError(ValueError):
    """The folder or the annotation file of a data set is not valid."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object: compressed COCO RLE, contiguous label, box [x, y, w, h] px.

    Attributes:
        area: The area that the data set gives, px; None: that of the mask.
    """

    rle: dict[str, Any]
    label: int
    box_xywh: tuple[float, float, float, float]
    area: float | None = None

    @property
    def mask_area(self) -> int:
        """Number of mask pixels."""
        return int(coco_mask.area(self.rle))


@dataclass(frozen=True, slots=True)
class PolygonObject:
    """One object with polygons, which are rasterised when they are needed."""

    polygons: Polygons
    label: int
    area: float | None = None

    def rasterise(self, height: int, width: int) -> Annotation:
        """The object in an image of this size, px."""
        rle = dict(coco_mask.merge(coco_mask.frPyObjects(list(self.polygons), height, width)))
        return build_annotation(rle, self.label, self.area)


def build_annotation(rle: dict[str, Any], label: int, area: float | None = None) -> Annotation:
    """An annotation; its box is computed from its mask."""
    x, y, w, h = (float(v) for v in coco_mask.toBbox(rle))
    return Annotation(rle, label, (x, y, w, h), area)


@dataclass(frozen=True, slots=True)
class FederatedLabels:
    """Which classes of an image are labelled, if these are not all.

    Attributes:
        negatives: Labels that it is known not to have an object of; None: all of which it has none.
        not_exhaustive: Labels of which not every object may be labelled.
    """

    negatives: frozenset[int] | None = None
    not_exhaustive: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Record:
    """One image with its objects; may have none.

    Attributes:
        crowds: Regions of many objects, which training leaves out and evaluation ignores.
        federated: Which classes are labelled; None: all.
    """

    image_id: ImageId
    file_name: str
    height: int
    width: int
    objects: tuple[Annotation | PolygonObject, ...]
    crowds: tuple[Annotation | PolygonObject, ...] = ()
    federated: FederatedLabels | None = None

    def exhaustive(self, num_classes: int) -> NDArray[np.bool_] | None:
        """Whether all objects of each class are labelled, [C]; None: those of all classes."""
        if self.federated is None:
            return None
        known = np.ones(num_classes, np.bool_)
        if self.federated.negatives is not None:
            known[:] = False
            known[[*self.federated.negatives, *(o.label for o in self.objects)]] = True
        known[list(self.federated.not_exhaustive)] = False
        return known

    @property
    def annotations(self) -> tuple[Annotation, ...]:
        """The objects as RLE; not stored, because 860,000 polygons would take minutes and 1 GB."""
        return self.rasterise(self.objects)

    def rasterise(self, objects: Sequence[Annotation | PolygonObject]) -> tuple[Annotation, ...]:
        """Objects of this image as RLE."""
        return tuple(
            o.rasterise(self.height, self.width) if isinstance(o, PolygonObject) else o
            for o in objects
        )
