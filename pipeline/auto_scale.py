"""Finds the scale of an image from objects that a model sees in some tiles of it.

Symbols: K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.model_config import MAX_ZOOM, Canvas, InputSpec, ModelConfig, TileResize
from pipeline.postprocess import TileCandidates, postprocess_tile
from pipeline.preprocess import count_canvases, prepare, tile_starts
from pipeline.scale import zoom_input
from pipeline.types import AnswerWarning, Prepared, Tile, UInt8

UNCERTAIN = "scale_uncertain"
PROBES = {0.5: 1, 1.0: 2, 2.0: 3}
"""Tiles that are looked at, by the scale relative to the model's own."""
OWN_RANGE = (0.5, 2.7)
"""The model's own scale is kept for objects of this size relative to its own: large ones are found
at it, small ones are not."""
LEAST_OBJECTS = 3
_AFAR = 8
"""Pixels of a tile's side where only its structure counts."""
_TILE_SPREAD = 0.5
"""Standard deviation of the logarithm of sizes that the model finds reliably."""


@dataclass(frozen=True)
class Sighting:
    """An object in a tile.

    Attributes:
        zoom: Of the tile.
        diameter_px: Of a disc with the object's area, image px.
        score: The model's.
    """

    zoom: float
    diameter_px: float
    score: float


@dataclass(frozen=True)
class ScaleChoice:
    """The scale for an image, relative to the model's own, and why it may be wrong."""

    zoom: float
    warnings: tuple[AnswerWarning, ...] = ()


def count_probes(image_hw: tuple[int, int], spec: InputSpec) -> int:
    """Tiles that `probe_image` makes of an image of this size."""
    return sum(
        min(most, count_canvases(image_hw, zoom_input(spec, zoom))) for zoom, most in PROBES.items()
    )


@dataclass(frozen=True)
class ImageProbe:
    """Some tiles of an image.

    Attributes:
        prepared: The tiles, all of one canvas size.
        zooms: The scale of each.
    """

    prepared: Prepared
    zooms: tuple[float, ...]

    def find(self, index: int, candidates: TileCandidates, config: ModelConfig) -> list[Sighting]:
        """Objects in one of the tiles that are not cut by its border."""
        tile, zoom = self.prepared.tiles[index], self.zooms[index]
        found = postprocess_tile(tile, candidates, self.prepared.image_hw, config.postprocess)
        return [
            Sighting(zoom, math.sqrt(4 * instance.area / math.pi), instance.score)
            for instance in found.instances
            if not _is_cut(instance.bbox_xywh, tile)
        ]


def _is_cut(box: tuple[int, int, int, int], tile: Tile) -> bool:
    x, y, width, height = box
    top, left, bottom, right = tile.shared
    window = tile.window
    return (
        (top is not None and y <= window.y)
        or (left is not None and x <= window.x)
        or (bottom is not None and y + height >= window.y + window.height)
        or (right is not None and x + width >= window.x + window.width)
    )


def probe_image(image: UInt8, spec: InputSpec, canvases: Sequence[Canvas] = ()) -> ImageProbe:
    """The tiles with the most structure at each of the scales of `PROBES`.

    Args:
        image: [H, W, 3] RGB uint8.
        spec: The model's input, with tiles.
        canvases: As for `prepare`.
    """
    tiles: list[Tile] = []
    zooms: list[float] = []
    for zoom, most in PROBES.items():
        zoomed = zoom_input(spec, zoom)
        found = prepare(image, zoomed, canvases=canvases).tiles
        for index in _most_structured(image, zoomed, most):
            tiles.append(found[index])
            zooms.append(zoom)
    height, width = image.shape[:2]
    return ImageProbe(Prepared((height, width), tiles), tuple(zooms))


def _most_structured(image: UInt8, spec: InputSpec, most: int) -> list[int]:
    """Indices of the tiles with the greatest variance of the grey values, seen from afar."""
    assert isinstance(spec.resize, TileResize)
    tile_hw, overlap = spec.resize.tile_hw, spec.resize.overlap_px
    image_hw = (image.shape[0], image.shape[1])
    small_hw = [max(1, round(n * _AFAR / tile)) for n, tile in zip(image_hw, tile_hw, strict=True)]
    small_hw = [min(pair) for pair in zip(small_hw, image_hw, strict=True)]
    small = cv2.resize(image, (small_hw[1], small_hw[0]), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    mean, squares = (cv2.boxFilter(g, cv2.CV_32F, (_AFAR, _AFAR)) for g in (grey, grey * grey))
    variance = squares - mean * mean
    places = [
        [
            min(side - 1, int((start + min(tile, n) / 2) * side / n))
            for start in tile_starts(n, tile, overlap)
        ]
        for n, tile, side in zip(image_hw, tile_hw, small_hw, strict=True)
    ]
    order = np.argsort(-variance[np.ix_(*places)].ravel(), kind="stable")
    return sorted(int(index) for index in order[:most])


def choose_scale(config: ModelConfig, sightings: Sequence[Sighting]) -> ScaleChoice:
    """The scale at which the objects have the size that the model expects.

    Args:
        config: Of the model; its card has `object_size_px`.
        sightings: In all tiles.
    """
    own = config.card.object_size_px
    assert own is not None
    if len(sightings) < LEAST_OBJECTS:
        message = f"{len(sightings)} objects are too few to find the scale by"
        return ScaleChoice(1.0, (AnswerWarning(UNCERTAIN, f"{message}; it was not changed"),))
    sizes = np.array([math.log(s.diameter_px / own) for s in sightings])
    seen = sizes + np.log([s.zoom for s in sightings])
    weights = np.array([s.score**2 for s in sightings]) * np.exp(-((seen / _TILE_SPREAD) ** 2) / 2)
    weights *= [s.zoom**2 for s in sightings]  # a tile shows less of the image
    low, middle, high = _weighted_quantiles(sizes, weights, (0.25, 0.5, 0.75))
    zoom = float(np.clip(math.exp(-middle), 1 / MAX_ZOOM, MAX_ZOOM))
    warnings: tuple[AnswerWarning, ...] = ()
    if high - low > math.log(2.5):
        sizes_px = f"{own * math.exp(low):.0f} to {own * math.exp(high):.0f} px"
        warnings = (
            AnswerWarning(UNCERTAIN, f"objects of {sizes_px} were found: the scale may be wrong"),
        )
    if OWN_RANGE[0] <= 1 / zoom <= OWN_RANGE[1]:
        zoom = 1.0
    elif zoom > 1 and _mean_score(sightings, 2.0) < _mean_score(sightings, 1.0):
        zoom = 1.0  # what looked like small objects is less certain when it is enlarged
        message = "small objects were found that are less certain when they are enlarged"
        warnings = (AnswerWarning(UNCERTAIN, f"{message}; the scale was not changed"),)
    return ScaleChoice(zoom, warnings)


def _mean_score(sightings: Sequence[Sighting], zoom: float) -> float:
    """Of the objects at a scale; 0 without any."""
    scores = [s.score for s in sightings if s.zoom == zoom]
    return sum(scores) / len(scores) if scores else 0.0


def _weighted_quantiles(
    values: np.ndarray[tuple[int], np.dtype[np.float64]],
    weights: np.ndarray[tuple[int], np.dtype[np.float64]],
    shares: tuple[float, ...],
) -> list[float]:
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weights[order])
    places = np.searchsorted(sums, np.array(shares) * sums[-1])
    return [float(values[order][min(place, len(values) - 1)]) for place in places]
