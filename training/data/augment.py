"""Random training samples: the network's input in serving, with random changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.model_config import KeepRatioResize, TileResize
from pipeline.preprocess import keep_ratio_size
from training.configs.schema import AugmentConfig
from training.cropped_masks import CroppedMasks
from training.data.records import Annotation
from training.targets import Objects

UInt8 = NDArray[np.uint8]
Rng = np.random.Generator


@dataclass(frozen=True)
class Sample:
    """A part of an image, [h, w, 3] uint8 at canvas scale without padding, and its objects."""

    image: UInt8
    objects: Objects


def crop_masks(
    annotations: Sequence[Annotation], top: int, left: int, height: int, width: int
) -> Iterator[tuple[UInt8, int]]:
    """Mask [height, width] and label of each object that has pixels in a window."""
    for annotation in annotations:
        x, y, w, h = annotation.box_xywh
        if x >= left + width or y >= top + height or x + w <= left or y + h <= top:
            continue
        mask = coco_mask.decode(annotation.rle)[top : top + height, left : left + width]
        if mask.any():
            yield mask, annotation.label


def photometric(image: UInt8, config: AugmentConfig, rng: Rng) -> UInt8:
    """Random brightness, contrast, gamma, inversion and stain, then blur and noise.

    What a configuration leaves out draws no random numbers.
    """
    level = np.arange(256, dtype=np.float64) / 255
    if config.levels < 256 and rng.random() < 0.5:
        steps = float(rng.integers(config.levels, 257)) - 1
        level = np.round(level * steps) / steps
    level = level ** np.exp(rng.uniform(-config.gamma, config.gamma))
    level = (level - 0.5) * (1 + rng.uniform(-config.contrast, config.contrast)) + 0.5
    level = level + rng.uniform(-config.brightness, config.brightness)
    if rng.random() < config.invert:
        level = 1 - level
    if config.stain and not _is_grey(image):
        gamma = np.exp(rng.uniform(-config.stain, config.stain, image.shape[2]))
        level = np.clip(level, 0, 1)[:, None] ** gamma
    table = (np.clip(level, 0, 1) * 255 + 0.5).astype(np.uint8)
    image = np.asarray(cv2.LUT(image, table.reshape(1, 256, -1)), np.uint8)
    return _degrade(image, config, rng)


def _is_grey(image: UInt8) -> bool:
    return bool((image == image[..., :1]).all())


def _degrade(image: UInt8, config: AugmentConfig, rng: Rng) -> UInt8:
    """Blur of the optics, then noise of the sensor, the same in all channels of a grey image."""
    blur, noise = (
        rng.uniform(0, most) if most and rng.random() < 0.5 else 0.0
        for most in (config.blur, config.noise)
    )
    if blur >= 0.1:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), blur), np.uint8)
    if noise:
        shape = (*image.shape[:2], 1 if _is_grey(image) else image.shape[2])
        changed = image + rng.normal(0, 255 * noise, shape)
        image = np.clip(changed + 0.5, 0, 255).astype(np.uint8)
    return image


def build_sample(image: UInt8, objects: Iterable[tuple[UInt8, int]]) -> Sample:
    """A sample of masks [h, w] and labels, of which only one mask is held as a whole at a time.

    Drops masks that are empty after resizing; computes boxes of the masks, x2, y2 exclusive.
    """
    masks = CroppedMasks((image.shape[0], image.shape[1]), np.uint8)
    boxes, labels = [], []
    for mask, label in objects:
        if mask.any():
            x, y, w, h = masks.append(mask)
            boxes.append((x, y, x + w, y + h))
            labels.append(label)
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    return Sample(image, Objects(masks, corners, np.asarray(labels, np.int64)))


def random_size(
    image_hw: tuple[int, int], resize: KeepRatioResize, config: AugmentConfig, rng: Rng
) -> tuple[int, int]:
    """Random height and width of a sample: short side from `short_sides`, long side limited."""
    low, high = config.short_sides
    return keep_ratio_size(image_hw, int(rng.integers(low, high + 1)), resize.long_side)


def check_sizes(resize: KeepRatioResize, config: AugmentConfig) -> None:
    """Refuses to train at other sizes than those of serving.

    Raises:
        ValueError: The short side of serving is not among those of training.
    """
    low, high = config.short_sides
    if not low <= resize.short_side <= high:
        raise ValueError(
            f"augment.short_sides is {low}-{high} px, and input.resize serves a short side of "
            f"{resize.short_side} px: set augment.short_sides to a range that contains it"
        )


def random_keep_ratio(
    image: UInt8,
    annotations: Sequence[Annotation],
    resize: KeepRatioResize,
    config: AugmentConfig,
    rng: Rng,
) -> Sample:
    """A random size and flip (paper, section 4)."""
    height, width = image.shape[:2]
    size = random_size((height, width), resize, config, rng)
    flip = rng.random() < config.flip
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    image = photometric(image, config, rng)
    if flip:
        image = np.ascontiguousarray(image[:, ::-1])

    def change(mask: UInt8) -> UInt8:
        resized = _resize_mask(mask, size)
        return np.ascontiguousarray(resized[:, ::-1]) if flip else resized

    objects = crop_masks(annotations, 0, 0, height, width)
    return build_sample(image, ((change(mask), label) for mask, label in objects))


def random_tile(
    image: UInt8,
    annotations: Sequence[Annotation],
    resize: TileResize,
    config: AugmentConfig,
    rng: Rng,
) -> Sample:
    """A random window at about the serving scale, on the canvas of serving.

    If the window is larger than the image, it shows the whole image, as in serving; the rest of
    the canvas is padding.
    """
    low, high = np.log(config.scale_jitter)
    scale = resize.scale * float(np.exp(rng.uniform(low, high)))
    canvas = [round(side * resize.scale) for side in resize.tile_hw]
    window = [min(round(c / scale), side) for c, side in zip(canvas, image.shape, strict=False)]
    top, left = (int(rng.integers(0, s - w + 1)) for s, w in zip(image.shape, window, strict=False))
    part = image[top : top + window[0], left : left + window[1]]
    part = photometric(part, config, rng)
    turns = 0
    if config.dihedral:
        turns = int(rng.integers(4)) if canvas[0] == canvas[1] else 2 * int(rng.integers(2))
    flip = rng.random() < config.flip

    def turn(pixels: UInt8) -> UInt8:
        turned = np.rot90(pixels, turns)
        return np.ascontiguousarray(turned[:, ::-1] if flip else turned)

    part = turn(part)
    height, width = (
        min(c, max(1, round(side * scale))) for c, side in zip(canvas, part.shape, strict=False)
    )
    image = cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    objects = crop_masks(annotations, top, left, *window)
    return build_sample(
        image, ((_resize_mask(turn(mask), (height, width)), label) for mask, label in objects)
    )


def _resize_mask(mask: UInt8, size: tuple[int, int]) -> UInt8:
    resized = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, np.uint8)
