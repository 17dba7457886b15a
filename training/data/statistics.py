"""Measures the statistics of a data set for self-configuration."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from training.configs.statistics import DataStatistics, ImageObjects
from training.data.coco import CocoDataset

MOST_IMAGES = 500
MOST_PIXELS_OF = 50
COLOUR_LEVELS = 8
"""Difference of channels up to which a pixel counts as grey; JPEG gives a few levels."""


def measure_statistics(data: CocoDataset) -> DataStatistics:
    """Statistics of a training split without contrast rule.

    Objects of at most 500 images and intensities of at most 50 are inspected, evenly spread over
    the split.

    Raises:
        DatasetError: An image cannot be decoded.
    """
    sample = []
    for index in _spread(len(data), MOST_IMAGES):
        record = data.records[index]
        boxes = np.asarray([a.box_xywh for a in record.annotations], np.float64).reshape(-1, 4)
        boxes = boxes[boxes[:, 2:].min(axis=1) > 0]
        sample.append(ImageObjects(image_hw=(record.height, record.width), boxes_xywh=boxes))
    ranges, medians, grey, bits = [], [], [], [8]
    for index in _spread(len(data), MOST_PIXELS_OF):
        image = data.image(index)
        low, middle, high = np.percentile(image, (0.5, 50, 99.8))
        ranges.append(high - low)
        medians.append(middle)
        coloured = image.max(axis=2) - image.min(axis=2) > COLOUR_LEVELS
        grey.append(bool(coloured.mean() < 0.01))
        bits.append(_bits(data.image_bytes(index)))
    return DataStatistics(
        num_images=len(data),
        num_classes=len(data.classes),
        sample=tuple(sample),
        grey=bool(np.mean(grey or [False]) > 0.5),
        bits=max(bits),
        intensity_range=float(np.median(ranges)) if ranges else 255.0,
        bright_share=float(np.mean(np.asarray(medians) > 127)) if medians else 0.5,
    )


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices, evenly spread over 0..count-1."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def _bits(file: bytes) -> int:
    """Bits per channel as the file's header says; 8 if Pillow does not read the format."""
    try:
        with Image.open(io.BytesIO(file)) as image:
            return 16 if image.mode.startswith("I") else 32 if image.mode == "F" else 8
    except OSError:
        return 8
