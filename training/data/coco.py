"""A COCO-format data set: images, objects as RLE, categories as contiguous labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from service.pipeline.decode import decode_image
from service.pipeline.errors import DecodeError
from service.pipeline.model_config import ClassSpec, ContrastSpec
from service.pipeline.preprocess import stretch_contrast

UInt8 = NDArray[np.uint8]
CACHE_LIMIT_BYTES = 2 * 1024**3


class DatasetError(ValueError):
    """The data set's folder or annotation file is not what it should be."""


@dataclass(frozen=True)
class Annotation:
    """One object: compressed COCO RLE, contiguous label, box [x, y, w, h] px."""

    rle: dict[str, Any]
    label: int
    box_xywh: tuple[float, float, float, float]


@dataclass(frozen=True)
class Record:
    """One image and its objects (crowds left out; possibly no object)."""

    image_id: int
    file_name: str
    height: int
    width: int
    annotations: tuple[Annotation, ...]


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split.

    Understands `annotations/{split}.json` with `images/`, and COCO 2017 as downloaded:
    `annotations/instances_{split}2017.json` with `{split}2017/`.

    Raises:
        DatasetError: No such file; names what was looked for.
    """
    tried = []
    for stem in (split, f"instances_{split}", f"instances_{split}2017"):
        annotation_file = root / "annotations" / f"{stem}.json"
        tried.append(str(annotation_file))
        if annotation_file.is_file():
            for folder in ("images", split, f"{split}2017"):
                if (root / folder).is_dir():
                    return annotation_file, root / folder
            raise DatasetError(f"{root} has no image folder (images, {split} or {split}2017)")
    raise DatasetError(f"no annotations of split {split!r}: looked for {', '.join(tried)}")


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons, uncompressed or compressed RLE -> compressed COCO RLE."""
    if isinstance(segmentation, list):
        return dict(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return dict(coco_mask.frPyObjects(segmentation, height, width))
    counts = segmentation["counts"]
    size = segmentation["size"]
    return {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}


class CocoDataset:
    """Reads a split; images are decoded as the server decodes them and kept in memory if few.

    Args:
        root: Folder with `annotations/` and the images.
        split: `train`, `val` or the name of any annotation file.
        contrast: Contrast rule of the model's input, applied to the whole image.

    Raises:
        DatasetError: Missing files or an annotation that cannot be read.
    """

    def __init__(self, root: Path, split: str, contrast: ContrastSpec | None = None) -> None:
        self.annotation_file, self.image_folder = find_split(root, split)
        self.contrast = contrast
        try:
            content = json.loads(self.annotation_file.read_text())
            categories = sorted(content["categories"], key=lambda c: int(c["id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{self.annotation_file} is not COCO JSON: {error!r}") from error
        self.classes = tuple(ClassSpec(category_id=c["id"], name=c["name"]) for c in categories)
        self.labels = {c.category_id: label for label, c in enumerate(self.classes)}
        try:
            self.records = self._read(content)
        except (KeyError, TypeError) as error:
            raise DatasetError(f"{self.annotation_file} lacks a COCO field: {error!r}") from error
        pixels = sum(r.height * r.width for r in self.records)
        self._cache: dict[int, UInt8] | None = {} if pixels * 3 <= CACHE_LIMIT_BYTES else None

    def _read(self, content: dict[str, Any]) -> list[Record]:
        by_image: dict[int, list[Annotation]] = {int(i["id"]): [] for i in content["images"]}
        sizes = {int(i["id"]): (int(i["height"]), int(i["width"])) for i in content["images"]}
        for row in content["annotations"]:
            image_id = int(row["image_id"])
            if image_id not in by_image or row["category_id"] not in self.labels:
                raise DatasetError(
                    f"annotation {row.get('id')} in {self.annotation_file} names image "
                    f"{image_id} and category {row['category_id']}; one of them is not listed"
                )
            if row.get("iscrowd", 0) or not row["segmentation"]:
                continue
            rle = to_rle(row["segmentation"], *sizes[image_id])
            if tuple(rle["size"]) != sizes[image_id]:
                raise DatasetError(
                    f"annotation {row.get('id')} in {self.annotation_file} is a mask of "
                    f"{rle['size']}, its image is {list(sizes[image_id])} (height, width)"
                )
            x, y, w, h = (float(v) for v in coco_mask.toBbox(rle))
            label = self.labels[row["category_id"]]
            by_image[image_id].append(Annotation(rle, label, (x, y, w, h)))
        return [
            Record(
                int(i["id"]),
                i["file_name"],
                int(i["height"]),
                int(i["width"]),
                tuple(by_image[int(i["id"])]),
            )
            for i in content["images"]
        ]

    def __len__(self) -> int:
        return len(self.records)

    def image_bytes(self, index: int) -> bytes:
        """The file of an image as it lies on the disk."""
        return (self.image_folder / self.records[index].file_name).read_bytes()

    def image(self, index: int) -> UInt8:
        """The decoded image [H, W, 3] RGB, contrast applied.

        Raises:
            DatasetError: The file cannot be decoded or its size is not the annotation's.
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
