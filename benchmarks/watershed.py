"""Nuclei without a network: Otsu's threshold, then the watershed of the distance transform.

Needs the extra `baseline` (scikit-image).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from benchmarks.harness import BenchmarkError
from pipeline.types import UInt8

try:
    from scipy import ndimage
    from skimage.feature import peak_local_max
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed
except ImportError as error:
    raise BenchmarkError("scikit-image is not installed: pip install '.[baseline]'") from error

BLUR_PX = 1.0
PEAK_DISTANCE_PX = 5
"""Least distance of two centres."""
LEAST_AREA_PX = 12
Labels = NDArray[np.int32]


def find_foreground(image: UInt8) -> NDArray[np.bool_]:
    """[H, W, 3] RGB -> [H, W]: the side of Otsu's threshold that is rarer along the border."""
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), BLUR_PX)
    if grey.min() == grey.max():
        return np.zeros(grey.shape, np.bool_)
    bright = grey > threshold_otsu(grey)
    border = np.concatenate([bright[0], bright[-1], bright[:, 0], bright[:, -1]])
    return np.asarray(~bright if border.mean() > 0.5 else bright, np.bool_)


def split_objects(foreground: NDArray[np.bool_]) -> Labels:
    """[H, W] -> [H, W] labels from 1, 0 for the background."""
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(foreground), BLUR_PX)
    parts, _ = ndimage.label(foreground)
    peaks = peak_local_max(
        distance, min_distance=PEAK_DISTANCE_PX, labels=parts, exclude_border=False
    )
    markers = np.zeros(foreground.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return np.asarray(watershed(-distance, markers, mask=foreground), np.int32)


def segment_image(image: UInt8, category_id: int) -> list[dict[str, Any]]:
    """COCO results without an image_id, all of score 1."""
    labels = split_objects(find_foreground(image))
    results = []
    for label in range(1, int(labels.max()) + 1):
        mask = np.asfortranarray(labels == label, np.uint8)
        if mask.sum() < LEAST_AREA_PX:
            continue
        rle = coco_mask.encode(mask)
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        results.append({"category_id": category_id, "score": 1.0, "segmentation": segmentation})
    return results
