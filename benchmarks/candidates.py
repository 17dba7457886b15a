"""Candidates like those of SOLO on COCO, without a network: the input of post-processing.

Objects are ellipses with a wavy outline. The square root of their area is log-normal, so that 41%
are smaller than 32x32 px, 34% smaller than 96x96 and 24% larger in an image of 640x480, as in
COCO; it grows with the image. One in ten has a second part some distance away, like an occluded
object. Canvas and mask grid are those of SOLO at 800x1333 px (stride 4). Each object is found by
five overlapping candidates, as by neighbouring cells and levels: 500 for 100 objects, as many as
SOLO keeps. Probabilities fall from 1 to 0 within about two mask pixels.

Symbols: H W image, h w mask at the mask stride, K candidates.
"""

from __future__ import annotations

import numpy as np

from pipeline.model_config import InputSpec, KeepRatioResize, MatrixNms, PostprocessSpec
from pipeline.preprocess import prepare
from pipeline.types import Candidates, Float32, Prepared

STRIDE = 4
CLASSES = 3
"""In one image; COCO's images have 3.5 on average."""
PER_OBJECT = 5
SOLO_INPUT = InputSpec(resize=KeepRatioResize(short_side=800, long_side=1333))
_MU, _SIGMA = 3.734, 1.176
"""Of ln(sqrt(area)) in an image of 640x480: gives COCO's shares of small and large objects."""
_REFERENCE_PX = (640 * 480) ** 0.5
_LEAST_PX = 3.0
"""Mask pixels across the smallest object."""
_SOFT_PX = 0.5


def solo_spec(count: int) -> PostprocessSpec:
    """SOLO's published post-processing, at most `count` instances."""
    return PostprocessSpec(
        nms=MatrixNms(), update_threshold=0.05, score_threshold=0.05, max_instances=count
    )


def prepare_image(image_hw: tuple[int, int]) -> Prepared:
    """A black image of [H, W] on SOLO's canvas."""
    return prepare(np.zeros((*image_hw, 3), np.uint8), SOLO_INPUT)


def draw_candidates(
    image_hw: tuple[int, int], objects: int, seed: int = 0
) -> tuple[Prepared, Candidates]:
    """An image of [H, W] on SOLO's canvas, and candidates in it.

    Args:
        image_hw: Height and width.
        objects: How many; there are `PER_OBJECT` candidates for each.
        seed: Of everything random.
    """
    rng = np.random.default_rng(seed)
    prepared = prepare_image(image_hw)
    (tile,) = prepared.tiles
    canvas_h, canvas_w = tile.image.shape[:2]
    probs = np.zeros((objects * PER_OBJECT, canvas_h // STRIDE, canvas_w // STRIDE), np.float32)
    seen_hw = tile.valid_hw[0] / STRIDE, tile.valid_hw[1] / STRIDE
    for number in range(objects):
        shapes = _draw_object(rng, seen_hw)
        for copy in range(PER_OBJECT):
            plane = probs[copy * objects + number]
            shift, growth = (0.0, 1.0) if copy == 0 else (0.06, rng.uniform(0.9, 1.1))
            for shape in shapes:
                _paint(plane, shape, rng.normal(0, shift, 2), growth)
    rank = np.arange(len(probs))
    scores = (0.95 - 0.8 * rank / len(probs)).astype(np.float32)
    labels = rank % objects % CLASSES
    return prepared, Candidates(scores, labels.astype(np.int64), probs)


class _Shape:
    """A wavy ellipse: centre, half axes, rotation, and the waves of its outline."""

    def __init__(
        self, rng: np.random.Generator, centre: tuple[float, float], size_px: float
    ) -> None:
        self.centre = np.array(centre)
        aspect = np.exp(rng.normal(0, 0.35))
        self.half_px = size_px / np.sqrt(np.pi) * np.array([aspect, 1 / aspect])
        self.turn = rng.uniform(0, np.pi)
        self.waves = rng.normal(0, 0.1, 5), rng.uniform(0, 2 * np.pi, 5)


def _draw_object(rng: np.random.Generator, seen_hw: tuple[float, float]) -> list[_Shape]:
    height, width = seen_hw
    scale = (height * width) ** 0.5 / _REFERENCE_PX
    size_px = max(_LEAST_PX, np.exp(rng.normal(_MU, _SIGMA)) * scale)
    size_px = min(size_px, 0.8 * (height * width) ** 0.5)
    centre = rng.uniform(0, height), rng.uniform(0, width)
    shapes = [_Shape(rng, centre, size_px)]
    if rng.random() < 0.1:
        away = rng.uniform(-1.5, 1.5, 2) * size_px
        shapes.append(_Shape(rng, (centre[0] + away[0], centre[1] + away[1]), size_px / 3))
    return shapes


def _paint(plane: Float32, shape: _Shape, shift: np.ndarray, growth: float) -> None:
    """Adds a shape to a mask's probabilities, inside its own box.

    Args:
        plane: [h, w].
        shape: The shape.
        shift: Of the centre, in half axes.
        growth: Factor of the size.
    """
    half_px = shape.half_px * growth
    centre = shape.centre + shift * half_px
    reach = 1.5 * half_px.max() + 8
    y0, x0 = (max(0, int(v - reach)) for v in centre)
    y1, x1 = (max(0, int(v + reach) + 1) for v in centre)
    part = plane[y0:y1, x0:x1]
    y, x = np.mgrid[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]]
    dy, dx = y - centre[0], x - centre[1]
    cos, sin = np.cos(shape.turn), np.sin(shape.turn)
    u, v = (cos * dy + sin * dx) / half_px[0], (cos * dx - sin * dy) / half_px[1]
    angle = np.arctan2(v, u)[..., None]
    size, phase = shape.waves
    order = np.arange(2, 7)
    outline = 1 + (size * 2 / order * np.cos(order * angle + phase)).sum(axis=-1)
    distance_px = (outline - np.hypot(u, v)) * np.sqrt(half_px.prod())
    probs = 1 / (1 + np.exp(-np.clip(distance_px / _SOFT_PX, -20, 20)))
    np.maximum(part, probs, out=part, casting="same_kind")
