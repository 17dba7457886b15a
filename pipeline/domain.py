"""Whether an image is like those that a model was trained on.

The statistics are of a thumbnail, so that they cost little however large the image is, of patches
at full resolution, which show its texture, and of the network's scores: photographs of other things
can look like the training images, but hardly anything in them is found with a high score. Of the
hues only yellow counts (brown, orange and green contain it): that photographs have it sets them
apart, while stains differ in hue.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.model_config import CONFIDENCE, DomainSpec, ModelConfig
from pipeline.types import AnswerWarning, UInt8

UNUSUAL, NOT_JUDGED = "unusual_image", "image_not_judged"
THUMBNAIL_PX = 96
"""Longer side of the thumbnail."""
PATCH_PX = 64
"""Side of a patch; its pixels may be half of that apart without another texture."""
PATCHES = 2
"""In each direction."""
LEAST_SIDE_PX = 24
LEAST_RANGE = 6.0
"""Difference of the 1st and 99th percentile of the grey levels."""
_LEAST_THUMBNAIL_PX = 8
_LEAST_STD = 0.02
_SAME = np.arange(256, dtype=np.uint8)


def describe_image(image: UInt8, levels: UInt8 | None = None) -> NDArray[np.float64] | None:
    """The `STATISTICS` of an image's pixels; None if it is too small or too uniform.

    Args:
        image: [H, W, 3] RGB uint8.
        levels: Map [256] of its intensities to those that are described; None: they stay.
    """
    if levels is None:
        levels = _SAME
    height, width = image.shape[:2]
    if min(height, width) < LEAST_SIDE_PX:
        return None
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    size = [max(_LEAST_THUMBNAIL_PX, round(length * scale)) for length in (width, height)]
    small = cv2.LUT(cv2.resize(image, size, interpolation=cv2.INTER_AREA), levels)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    least, low, high, most = (float(v) for v in np.percentile(grey, (1, 5, 95, 99)))
    if most - least < LEAST_RANGE:
        return None
    mean, std = (float(v[0, 0]) for v in cv2.meanStdDev(grey))
    red, green, blue = cv2.split(small)
    most_of_pixel = cv2.max(cv2.max(red, green), blue)
    saturation = cv2.mean(cv2.subtract(most_of_pixel, cv2.min(cv2.min(red, green), blue)))[0]
    yellow = cv2.mean(cv2.subtract(cv2.min(red, green), blue))[0]
    shares = np.array([mean, std, low, high, saturation, yellow]) / 255
    return np.concatenate([shares, _texture(image, levels, max(std / 255, _LEAST_STD))])


def _texture(image: UInt8, levels: UInt8, contrast: float) -> tuple[float, float]:
    """Fine detail relative to the contrast, and how far gradients have one direction."""
    details, directions = [], []
    for patch in _patches(image):
        grey = cv2.cvtColor(cv2.LUT(patch, levels), cv2.COLOR_RGB2GRAY)
        fine = cv2.Laplacian(grey, cv2.CV_16S)
        details.append(cv2.norm(fine, cv2.NORM_L1) / fine.size / 255 / contrast)
        dx = cv2.Sobel(grey, cv2.CV_32F, 1, 0, scale=1 / 255)
        dy = cv2.Sobel(grey, cv2.CV_32F, 0, 1, scale=1 / 255)
        xx, yy, xy = (a.ravel().dot(b.ravel()) / a.size for a, b in ((dx, dx), (dy, dy), (dx, dy)))
        directions.append(float(np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-4)))
    return float(np.mean(details)), float(np.mean(directions))


def _patches(image: UInt8) -> list[UInt8]:
    """Evenly spread patches; fewer if the image is smaller than that."""
    starts = (
        sorted({round(i * max(0, length - PATCH_PX) / (PATCHES - 1)) for i in range(PATCHES)})
        for length in image.shape[:2]
    )
    ys, xs = starts
    return [image[y : y + PATCH_PX, x : x + PATCH_PX] for y in ys for x in xs]


def measure_distance(appearance: NDArray[np.float64], confidence: float, spec: DomainSpec) -> float:
    """Distance to the nearest centre, in the spreads of the training images.

    Args:
        appearance: Of `describe_image`.
        confidence: See `Detections`; more than usual adds nothing.
        spec: Of the model.
    """
    has_confidence = spec.statistics[-1] == CONFIDENCE
    statistics = np.append(appearance, confidence) if has_confidence else appearance
    offsets = (np.array(spec.centres) - statistics) / np.array(spec.spreads)
    return float(measure_offsets(offsets, has_confidence=has_confidence).min())


def measure_offsets(
    offsets: NDArray[np.float64], *, has_confidence: bool = True
) -> NDArray[np.float64]:
    """Lengths of offsets [..., S] of centres from images; changes the offsets.

    Args:
        offsets: In spreads.
        has_confidence: The last one is of confidence: more than a centre's adds nothing.
    """
    if has_confidence:
        offsets[..., -1] = np.maximum(offsets[..., -1], 0)
    return np.asarray(np.sqrt((offsets**2).sum(axis=-1)))


def describe_exposures(
    image: UInt8, config: ModelConfig, levels: UInt8 | None = None
) -> list[NDArray[np.float64]]:
    """What `check_domain` needs to know of an image's pixels; empty if it cannot be described.

    Args:
        image: [H, W, 3] RGB uint8.
        config: Of the model; without `domain` nothing is described.
        levels: Of an image whose contrast was stretched, as the training images are described as
            they were recorded: maps [K, 256], see `EncodedImage.decode_stretched`.
    """
    if config.domain is None:
        return []
    exposures = [None] if levels is None else list(levels)
    described = [describe_image(image, exposure) for exposure in exposures]
    return [appearance for appearance in described if appearance is not None]


def check_domain(
    described: Sequence[NDArray[np.float64]], confidence: float, config: ModelConfig
) -> list[AnswerWarning]:
    """A warning if an image is unlike those that the model was trained on, or cannot be judged.

    Args:
        described: Of `describe_exposures`; one that makes the image usual suffices.
        confidence: See `Detections`.
        config: Of the model; without `domain` there is no warning.
    """
    spec = config.domain
    if spec is None:
        return []
    if not described:
        reason = f"too small or too uniform to tell whether model {config.name!r} suits it"
        return [AnswerWarning(NOT_JUDGED, f"the image is {reason}")]
    distance = min(measure_distance(a, confidence, spec) for a in described)
    if distance <= spec.threshold:
        return []
    purpose = f" ({config.card.domain})" if config.card.domain else ""
    return [
        AnswerWarning(
            UNUSUAL,
            f"the image is unlike those that model {config.name!r} was trained on{purpose}: "
            f"distance {distance:.1f}, usually up to {spec.threshold:.1f}; its result may be "
            "meaningless",
        )
    ]
