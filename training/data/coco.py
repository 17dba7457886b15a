"""A COCO-format data set: images, objects as RLE, contiguous labels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.decode import decode_image
from pipeline.errors import DecodeError
from pipeline.model_config import ClassSpec, ContrastSpec
from pipeline.preprocess import stretch_contrast
from pipeline.runs import read_counts
from training.data.coco_json import AnnotationRow, Polygons, read_coco_json

UInt8 = NDArray[np.uint8]
YEARS = ("", "2017")
CACHE_LIMIT_BYTES = 2 * 1024**3
_FARTHEST = 10
"""Coordinates of polygons may be so many times height + width; rasterising takes as long."""
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What fields that are missing or of other types raise."""


class DatasetError(ValueError):
    """The folder or the annotation file of a data set is not valid."""


@dataclass(frozen=True)
class Annotation:
    """One object: compressed COCO RLE, contiguous label, box [x, y, w, h] px."""

    rle: dict[str, Any]
    label: int
    box_xywh: tuple[float, float, float, float]


@dataclass(frozen=True)
class PolygonObject:
    """One object with polygons, which are rasterised when they are needed."""

    polygons: Polygons
    label: int

    def rasterise(self, height: int, width: int) -> Annotation:
        """The object in an image of this size, px."""
        return build_annotation(to_rle(list(self.polygons), height, width), self.label)


@dataclass(frozen=True)
class Record:
    """One image and its objects, without crowds; may have no object."""

    image_id: int
    file_name: str
    height: int
    width: int
    objects: tuple[Annotation | PolygonObject, ...]

    @property
    def annotations(self) -> tuple[Annotation, ...]:
        """The objects as RLE; not stored, because 860,000 polygons would take minutes and 1 GB."""
        return tuple(
            o.rasterise(self.height, self.width) if isinstance(o, PolygonObject) else o
            for o in self.objects
        )


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split.

    Finds `annotations/{split}.json` with `images/`, and COCO 2017 as downloaded:
    `annotations/instances_{split}2017.json` with `{split}2017/`, and for `test-dev`
    `annotations/image_info_test-dev2017.json` with `test2017/`.

    Raises:
        DatasetError: There is no such file; lists those that were searched.
    """
    name = split.removeprefix("instances_").removeprefix("image_info_")
    stems = [split] + [
        prefix + name + year for prefix in ("", "instances_", "image_info_") for year in YEARS
    ]
    files = [root / "annotations" / f"{stem}.json" for stem in dict.fromkeys(stems)]
    found = [file for file in files if file.is_file()]
    if not found:
        tried = ", ".join(str(file) for file in files)
        raise DatasetError(f"no annotations of split {split!r}: looked for {tried}")
    names = dict.fromkeys((name, name.replace("-dev", "")))  # test-dev is a part of test
    folders = ["images", *(n + year for n in names for year in YEARS)]
    for folder in folders:
        if (root / folder).is_dir():
            return found[0], root / folder
    raise DatasetError(f"{root} has no image folder: looked for {', '.join(folders)}")


def build_annotation(rle: dict[str, Any], label: int) -> Annotation:
    """An annotation; its box is computed from its mask."""
    x, y, w, h = (float(v) for v in coco_mask.toBbox(rle))
    return Annotation(rle, label, (x, y, w, h))


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons, uncompressed or compressed RLE -> compressed COCO RLE.

    Raises:
        ValueError: The counts of the RLE do not fill its size.
    """
    if isinstance(segmentation, list):
        return dict(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    counts, size = segmentation["counts"], [int(length) for length in segmentation["size"]]
    rows, columns = size
    if isinstance(counts, list):
        if min(counts, default=0) < 0 or sum(counts) != rows * columns:
            raise ValueError(f"the RLE counts give {sum(counts)} pixels, its size is {size}")
        return dict(coco_mask.frPyObjects({"size": size, "counts": counts}, height, width))
    read_counts(counts, rows * columns)
    return {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}


class CocoDataset:
    """A split of a data set; images are decoded as in the server, and cached if the set is small.

    Args:
        root: Folder with `annotations/` and the images.
        split: `train`, `val` or the name of any annotation file.
        contrast: Contrast rule of the model's input, applied to whole images.

    Attributes:
        labelled: Whether the file has annotations; those of COCO's test images do not.

    Raises:
        DatasetError: A file is missing, or an annotation cannot be read.
    """

    def __init__(self, root: Path, split: str, contrast: ContrastSpec | None = None) -> None:
        self.annotation_file, self.image_folder = find_split(root, split)
        self.contrast = contrast
        try:
            content, rows = read_coco_json(self.annotation_file)
            categories = sorted(content["categories"], key=lambda c: int(c["id"]))
            self.classes = tuple(ClassSpec(category_id=c["id"], name=c["name"]) for c in categories)
        except (*_MALFORMED, RecursionError) as error:
            raise DatasetError(f"{self.annotation_file} is not COCO JSON: {error!r}") from error
        self.labels = {c.category_id: label for label, c in enumerate(self.classes)}
        try:
            self.labelled = rows is not None
            self.records = self._read(content["images"], rows or [])
        except DatasetError:
            raise
        except _MALFORMED as error:
            raise DatasetError(
                f"{self.annotation_file} lacks a COCO field, or has a wrong one: {error!r}"
            ) from error
        pixels = sum(r.height * r.width for r in self.records)
        self._cache: dict[int, UInt8] | None = {} if pixels * 3 <= CACHE_LIMIT_BYTES else None

    def _read(self, images: list[dict[str, Any]], rows: list[AnnotationRow]) -> list[Record]:
        by_image: dict[int, list[Annotation | PolygonObject]] = {int(i["id"]): [] for i in images}
        sizes = {int(i["id"]): (int(i["height"]), int(i["width"])) for i in images}
        for row in rows:
            if row.image_id not in by_image or row.category_id not in self.labels:
                raise DatasetError(
                    f"annotation {row.id} in {self.annotation_file} names image "
                    f"{row.image_id} and category {row.category_id}; one of them is not listed"
                )
            if row.segmentation is not None:
                found = self._object(row, row.segmentation, sizes[row.image_id])
                by_image[row.image_id].append(found)
        return [
            Record(
                int(i["id"]), i["file_name"], *sizes[int(i["id"])], tuple(by_image[int(i["id"])])
            )
            for i in images
        ]

    def _object(
        self, row: AnnotationRow, segmentation: Polygons | dict[str, Any], image_hw: tuple[int, int]
    ) -> Annotation | PolygonObject:
        label = self.labels[row.category_id]
        if isinstance(segmentation, tuple):
            most = _FARTHEST * sum(image_hw)
            for polygon in segmentation:
                far = polygon[~(np.abs(polygon) <= most)]  # NaN, too
                if far.size:
                    raise DatasetError(
                        f"annotation {row.id} in {self.annotation_file} has a polygon with the "
                        f"coordinate {far[0]}, its image is {list(image_hw)} (height, width)"
                    )
            return PolygonObject(segmentation, label)
        try:
            rle = to_rle(segmentation, *image_hw)
        except _MALFORMED as error:
            raise DatasetError(
                f"annotation {row.id} in {self.annotation_file}: {error or type(error).__name__}"
            ) from error
        if tuple(rle["size"]) != image_hw:
            raise DatasetError(
                f"annotation {row.id} in {self.annotation_file} is a mask of "
                f"{rle['size']}, its image is {list(image_hw)} (height, width)"
            )
        return build_annotation(rle, label)

    def __len__(self) -> int:
        return len(self.records)

    def with_objects(self) -> CocoDataset:
        """The images that have objects, crowds not counted; without an object, all images."""
        records = [record for record in self.records if record.objects]
        if len(records) in (0, len(self)):
            return self
        other = copy.copy(self)
        other.records = records
        other._cache = None if self._cache is None else {}
        return other

    def image_bytes(self, index: int) -> bytes:
        """The encoded file of an image."""
        return (self.image_folder / self.records[index].file_name).read_bytes()

    def image(self, index: int) -> UInt8:
        """The decoded image [H, W, 3] RGB, contrast applied.

        Raises:
            DatasetError: The file cannot be decoded, or its size is not that in the annotations.
        """
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        record = self.records[index]
        try:
            image = decode_image(self.image_bytes(index))
        except DecodeError as error:
            raise DatasetError(f"{record.file_name}: {error}") from error
        if image.shape[:2] != (record.height, record.width):
            raise DatasetError(
                f"{record.file_name} is {image.shape[1]}x{image.shape[0]} px, "
                f"its annotation says {record.width}x{record.height}"
            )
        if self.contrast is not None:
            image = stretch_contrast(image, self.contrast)
        if self._cache is not None:
            self._cache[index] = image
        return image
