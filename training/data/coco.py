"""A checked data set: images, objects, contiguous labels."""

from __future__ import annotations

import argparse
import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.decode import decode_image
from pipeline.errors import DecodeError
from pipeline.model_config import ContrastSpec
from pipeline.preprocess import stretch_contrast
from training.data.federated import format_federated
from training.data.formats import open_dataset
from training.data.headers import read_sizes
from training.data.records import Annotation, DatasetError, ImageId, Record
from training.data.validate import check_content

UInt8 = NDArray[np.uint8]
CACHE_LIMIT_BYTES = 2 * 1024**3


class CocoDataset:
    """A split of a data set; images are decoded as in the server, and cached if the set is small.

    Args:
        root: Folder of labelled images, see `training.data.formats`.
        split: `train`, `val` or the name of any annotation file.
        contrast: Contrast rule of the model's input, applied to whole images.
        format: Format of the labels; by default it is found.
        val_fraction: Share of the images for validation, if no split is given for it.

    Attributes:
        records: Images and objects that were checked; objects that cannot be used are left out.
        checked: The records, their classes and the report of the check.
        image_fields: The entries of the images in the annotation file.
        labelled: Whether the file has annotations; those of COCO's test images do not.

    Raises:
        DatasetError: A file is missing, or something in it is refused; names the first fault.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        contrast: ContrastSpec | None = None,
        *,
        format: str | None = None,
        val_fraction: float | None = None,
    ) -> None:
        content = open_dataset(root, split, format, val_fraction)
        self.annotation_file, self.image_folder = Path(content.source), content.image_folder
        self.contrast = contrast
        self.checked = check_content(content, read_sizes)
        self.report = self.checked.report
        if self.report.refusal:
            raise DatasetError(self.report.refusal)
        self.image_fields = content.images
        self.labelled = self.report.labelled
        self.records, self.classes = self.checked.records, self.checked.classes
        self.labels = {c.category_id: label for label, c in enumerate(self.classes)}
        pixels = sum(r.height * r.width for r in self.records)
        self._cache: dict[ImageId, UInt8] | None = {} if pixels * 3 <= CACHE_LIMIT_BYTES else None

    def __len__(self) -> int:
        return len(self.records)

    def with_objects(self) -> CocoDataset:
        """The images that have objects, crowds not counted; without an object, all images."""
        records = [record for record in self.records if record.objects]
        return self._with_records(records or self.records)

    def with_repeats(self, below: float) -> CocoDataset:
        """Repeats images of rare classes (LVIS, arXiv 1908.03195).

        Args:
            below: Share f of the images; an image is repeated sqrt(f / s) times, rounded, where s
                is the share of the images that have the rarest of its classes.
        """
        labels = [{item.label for item in record.objects} for record in self.records]
        counts = Counter(label for present in labels for label in present)
        records = []
        for record, present in zip(self.records, labels, strict=True):
            rarest = min((counts[label] for label in present), default=len(self))
            factor = math.sqrt(below * len(self) / rarest)
            records += [record] * max(1, math.floor(factor + 0.5))
        return self._with_records(records)

    def with_contrast(self, contrast: ContrastSpec | None) -> CocoDataset:
        """The same images with another contrast rule; nothing is checked again."""
        other = self._copy()
        other.contrast = contrast
        return other

    def _with_records(self, records: list[Record]) -> CocoDataset:
        """This data set if these are as many as its own, else another one."""
        if len(records) == len(self):
            return self
        other = self._copy()
        other.records = records
        return other

    def _copy(self) -> CocoDataset:
        """Another data set of the same records, with no image in its cache."""
        other = copy.copy(self)
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
        record = self.records[index]
        if self._cache is not None and record.image_id in self._cache:
            return self._cache[record.image_id]
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
            self._cache[record.image_id] = image
        return image

    def truth(self) -> dict[str, Any]:
        """The ground truth as COCO JSON with fresh annotation ids, for `mask_ap`."""
        annotations: list[dict[str, Any]] = []
        for record in self.records:
            for crowd, objects in enumerate((record.objects, record.crowds)):
                for item in record.rasterise(objects):
                    annotations.append(self._truth_of(item, record, crowd, len(annotations) + 1))
        return {
            "images": [
                {"id": r.image_id, "height": r.height, "width": r.width}
                | format_federated(r.federated, self.classes)
                for r in self.records
            ],
            "categories": [{"id": c.category_id, "name": c.name} for c in self.classes],
            "annotations": annotations,
        }

    def _truth_of(
        self, item: Annotation, record: Record, crowd: int, number: int
    ) -> dict[str, Any]:
        return {
            "id": number,
            "image_id": record.image_id,
            "category_id": self.classes[item.label].category_id,
            "segmentation": item.rle,
            "bbox": list(item.box_xywh),
            "area": item.mask_area if item.area is None else item.area,
            "iscrowd": crowd,
        }


def open_split(options: argparse.Namespace, split: str) -> CocoDataset:
    """A split of the data set that the options `data`, `format` and `val_fraction` name."""
    return CocoDataset(
        options.data, split, format=options.format, val_fraction=options.val_fraction
    )
