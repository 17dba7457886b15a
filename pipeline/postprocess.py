"""Candidates become instances: NMS, binarise, top N, paste, merge over tiles (paper, 3.4).

The only post-processing there is: the server and the evaluation of training both call it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.calibration import to_network, to_reported
from pipeline.contour import fill_contours
from pipeline.merge import TileInstance, merge_tiles
from pipeline.model_config import MAX_INT, Calibration, MatrixNms, PostprocessSpec
from pipeline.nms import mask_nms, matrix_nms
from pipeline.overlaps import resolve_overlaps
from pipeline.paste import paste_masks
from pipeline.types import Candidates, Detection, Float32, Int64, Prepared, Tile, Window


class DeviceCandidates(Protocol):
    """One tile's graph output that stayed on an accelerator, which post-processes it itself.

    Scores and labels are those of `Candidates`, on the host.
    """

    @property
    def scores(self) -> Float32:
        """[K] float32."""
        ...

    @property
    def labels(self) -> Int64:
        """[K] int64."""
        ...

    @property
    def mask_hw(self) -> tuple[int, int]:
        """h, w."""
        ...

    def find_instances(
        self,
        tile: Tile,
        image_hw: tuple[int, int],
        spec: PostprocessSpec,
        *,
        score_threshold: float,
        max_instances: int,
    ) -> list[Detection]:
        """What `postprocess_tile` finds in `Candidates`, in coordinates of the image."""
        ...

    def count_survivors(self, spec: PostprocessSpec, score_threshold: float) -> int:
        """Candidates that NMS keeps with at least this score."""
        ...


TileCandidates = Candidates | DeviceCandidates
CONFIDENT = 5
"""Candidates whose scores make a tile's confidence."""
Overlaps = Literal["keep", "resolve"]
"""Whether pixels of several masks stay with all of them, or are given to the best one."""


def select(
    candidates: Candidates, spec: PostprocessSpec, *, least_score: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """NMS at the mask stride.

    Neither NMS raises a score, and no candidate has a say about a better one: those below the
    least score are left out from the start.

    Args:
        candidates: One tile's, best first.
        spec: Kind of NMS and thresholds.
        least_score: Survivors have at least this score.

    Returns:
        Scores and indices of the survivors, best first (ties: the earlier candidate).
    """
    least_score = max(least_score, spec.update_threshold)
    used = (candidates.scores > 0) & (candidates.scores >= least_score)
    slots = used.nonzero()[0]
    if slots.size == 0:
        return candidates.scores[:0], slots
    count = int(slots[-1]) + 1  # empty slots come last: no copy of them
    masks = candidates.mask_probs[:count] > spec.mask_threshold
    filled = np.flatnonzero(used[:count] & masks.reshape(count, -1).any(axis=1))
    if filled.size < count:
        masks = masks[filled]
    if spec.compare == "enclosed":
        masks = fill_contours(masks)
    scores, labels = candidates.scores[filled], candidates.labels[filled]
    if isinstance(spec.nms, MatrixNms):
        scores = matrix_nms(scores, labels, masks, kernel=spec.nms.kernel, sigma=spec.nms.sigma)
        kept = np.arange(len(scores))
    else:
        kept = mask_nms(scores, labels, masks, iou_threshold=spec.nms.iou_threshold)
    kept = kept[scores[kept] >= least_score]
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    return scores[kept], filled[kept]


def mask_stride(tile: Tile, mask_hw: tuple[int, int]) -> int:
    """Canvas px per mask px.

    Raises:
        ValueError: The masks do not divide the canvas.
    """
    height, width = mask_hw
    stride, rest = divmod(tile.image.shape[0], height)
    if rest or width * stride != tile.image.shape[1]:
        raise ValueError(
            f"masks of {height}x{width} do not divide the canvas {tile.image.shape[:2]}"
        )
    return int(stride)


def _place(instance: Detection, tile: Tile, stride: int, number: int) -> TileInstance:
    """An instance, its number in the tile, and what its tile's inner borders do to it.

    It is cut if it comes within one mask pixel of an inner border. If it lies wholly, by the same
    margin, in what the next tile beyond each such border shows too, it is that tile's.
    """
    (x, y, width, height), window = instance.bbox_xywh, tile.window
    near_y = stride * window.height / tile.valid_hw[0]
    near_x = stride * window.width / tile.valid_hw[1]
    top, left, bottom, right = tile.shared
    step_y, clear_y = _step((y - window.y, height), window.height, (top, bottom), near_y)
    step_x, clear_x = _step((x - window.x, width), window.width, (left, right), near_x)
    if not step_y and not step_x:
        return TileInstance(instance, window, cut=False, number=number)
    beyond = Window(window.y + step_y, window.x + step_x, window.height, window.width)
    elsewhere = beyond if clear_y and clear_x else None
    return TileInstance(instance, window, True, elsewhere, number)


def _step(
    span: tuple[int, int], length: int, shared: tuple[int | None, int | None], near: float
) -> tuple[int, bool]:
    """Where a tile's neighbour along one axis lies that a mask reaches over to.

    Args:
        span: Start of the mask in the tile, and its length.
        length: Of the tile.
        shared: With the tile before and the tile after; None: there is none.
        near: Within this distance of a border a mask reaches it.

    Returns:
        Offset of the neighbour, 0 if no inner border is reached; and whether the neighbour shows
        all of the mask, clear of its own border.
    """
    before, after = shared
    start, end = span[0], length - sum(span)
    if after is not None and end < near:
        return length - after, after - (length - start) >= near
    if before is not None and start < near:
        return before - length, before - (length - end) >= near
    return 0, True


def _bounds(
    spec: PostprocessSpec, score_threshold: float | None, max_instances: int | None
) -> tuple[float, int]:
    threshold = spec.score_threshold if score_threshold is None else score_threshold
    bound = spec.max_instances if max_instances is None else max_instances
    if not 0 <= threshold <= 1 or bound < 1:
        raise ValueError(f"score_threshold {threshold} or max_instances {bound} is out of range")
    return threshold, bound


@dataclass(frozen=True)
class Detections:
    """The instances of an image or of one of its tiles.

    Attributes:
        instances: Best first, at most `max_instances`.
        found: How many there were before that bound. Objects that several tiles show and that are
            cut off within a tile count once for each of them.
        confidence: 0..1, see `measure_confidence`; the highest of the tiles.
    """

    instances: list[Detection]
    found: int
    confidence: float


def measure_confidence(candidates: TileCandidates, spec: PostprocessSpec) -> float:
    """Mean score of the best candidates, before NMS; those below `update_threshold` count as 0."""
    best = candidates.scores[:CONFIDENT]
    return float(best[best >= spec.update_threshold].sum()) / CONFIDENT


def postprocess_tile(
    tile: Tile,
    candidates: TileCandidates,
    image_hw: tuple[int, int],
    spec: PostprocessSpec,
    *,
    score_threshold: float | None = None,
    max_instances: int | None = None,
) -> Detections:
    """Instances of one tile in coordinates of the image.

    Args:
        tile: What the engine saw.
        candidates: What it answered.
        image_hw: Height and width of the original image.
        spec: The model's post-processing.
        score_threshold: Least score of a returned instance, not calibrated; default from `spec`.
        max_instances: Most instances returned; default from `spec`.

    Raises:
        ValueError: A bound is out of range, or the masks do not fit the canvas.
    """
    threshold, bound = _bounds(spec, score_threshold, max_instances)
    mask_stride(tile, candidates.mask_hw)
    confidence = measure_confidence(candidates, spec)
    if isinstance(candidates, Candidates):
        found_here = _find_instances(candidates, tile, image_hw, spec, threshold, bound)
        return Detections(*found_here, confidence)
    instances = candidates.find_instances(
        tile, image_hw, spec, score_threshold=threshold, max_instances=bound
    )
    found = len(instances)
    if found == bound:
        found = max(found, candidates.count_survivors(spec, threshold))
    return Detections(instances, found, confidence)


def _find_instances(
    candidates: Candidates,
    tile: Tile,
    image_hw: tuple[int, int],
    spec: PostprocessSpec,
    score_threshold: float,
    max_instances: int,
) -> tuple[list[Detection], int]:
    """`instances` and `found` of `Detections`."""
    scores, indices = select(candidates, spec, least_score=score_threshold)
    stride = mask_stride(tile, candidates.mask_hw)
    found: list[Detection] = []
    for start in range(0, len(indices), max_instances):
        some = slice(start, start + max_instances)  # rarely is any of them empty
        masks = (candidates.mask_probs[index] for index in indices[some])
        pasted = paste_masks(masks, tile, stride, image_hw, spec.mask_threshold)
        found += [
            Detection(int(candidates.labels[index]), float(score), *outline)
            for score, index, outline in zip(scores[some], indices[some], pasted, strict=True)
            if outline is not None
        ]
        if len(found) >= max_instances:
            rest = len(indices) - some.stop  # not pasted, so not known to be empty
            return found[:max_instances], len(found) + max(0, rest)
    return found, len(found)


@dataclass(frozen=True)
class TileFindings:
    """What `Collector.search` finds in a tile; `found` and `confidence` as in `Detections`."""

    entries: list[TileInstance]
    found: int
    confidence: float


class Collector:
    """Collects the instances of one image tile by tile, in any order; not thread-safe.

    Args:
        image_hw: Height and width of the original image.
        tiles: How many tiles it has.
        spec: The model's post-processing.
        score_threshold: Least score of a returned instance; default from `spec`.
        max_instances: Most instances returned; default from `spec`.
        overlaps: What becomes of pixels of several masks.
        calibration: Of scores and of their threshold.

    Raises:
        ValueError: A bound is out of range.
    """

    def __init__(
        self,
        image_hw: tuple[int, int],
        tiles: int,
        spec: PostprocessSpec,
        *,
        score_threshold: float | None = None,
        max_instances: int | None = None,
        overlaps: Overlaps = "keep",
        calibration: Calibration | None = None,
    ) -> None:
        self._image_hw = image_hw
        self._tiles = tiles
        self._spec = spec
        threshold, self._bound = _bounds(spec, score_threshold, max_instances)
        self._threshold, self._calibration = to_network(calibration, threshold), calibration
        self._overlaps = overlaps
        self._is_final = tiles == 1 and overlaps == "keep"
        self._found: dict[int, list[TileInstance]] = {}
        self._dropped = 0
        self._confidence = 0.0

    def search(self, tile: Tile, candidates: TileCandidates) -> TileFindings:
        """Instances of one tile, for `add`; any number of threads may call it at once.

        Raises:
            ValueError: The masks do not fit the canvas.
        """
        detections = postprocess_tile(
            tile,
            candidates,
            self._image_hw,
            self._spec,
            score_threshold=self._threshold,
            # Merging and resolving drop some: only `merge` knows which are left.
            max_instances=self._bound if self._is_final else MAX_INT,
        )
        entries = []
        if detections.instances:
            stride = mask_stride(tile, candidates.mask_hw)
            entries = [
                _place(instance, tile, stride, number)
                for number, instance in enumerate(detections.instances)
            ]
        return TileFindings(entries, detections.found, detections.confidence)

    def add(self, index: int, tile: TileFindings) -> None:
        """Takes what `search` found in the tile with this index."""
        self._found[index] = tile.entries
        self._dropped += tile.found - len(tile.entries)
        self._confidence = max(self._confidence, tile.confidence)

    def merge(self) -> Detections:
        """Instances of the image: those of its only tile, or those of all tiles merged."""
        entries = [entry for index in sorted(self._found) for entry in self._found[index]]
        if self._tiles == 1 or not entries:
            instances = [entry.instance for entry in entries]
        else:
            instances = merge_tiles(entries, compare=self._spec.compare)
        if self._overlaps == "resolve":
            instances = resolve_overlaps(instances)
        if self._calibration is not None:
            instances = [
                replace(i, score=to_reported(self._calibration, i.score)) for i in instances
            ]
        found = len(instances) + self._dropped
        return Detections(instances[: self._bound], found, self._confidence)


def postprocess(
    prepared: Prepared,
    candidates: Iterable[TileCandidates],
    spec: PostprocessSpec,
    *,
    score_threshold: float | None = None,
    max_instances: int | None = None,
    overlaps: Overlaps = "keep",
    calibration: Calibration | None = None,
) -> Detections:
    """Instances of one image: `postprocess_tile` of each tile, then `merge_tiles`.

    Args:
        prepared: The image's tiles.
        candidates: One entry a tile, in their order; may be made while they are consumed.
        spec: The model's post-processing.
        score_threshold: Least score of a returned instance; default from `spec`.
        max_instances: Most instances returned; default from `spec`.
        overlaps: What becomes of pixels of several masks.
        calibration: Of scores and of their threshold.

    Raises:
        ValueError: The number of candidates' entries is not that of the tiles, a bound is out
            of range, or masks do not fit their canvas.
    """
    collector = Collector(
        prepared.image_hw,
        len(prepared.tiles),
        spec,
        score_threshold=score_threshold,
        max_instances=max_instances,
        overlaps=overlaps,
        calibration=calibration,
    )
    count, total = 0, len(prepared.tiles)
    for count, found in enumerate(candidates, 1):
        if count <= total:
            tile = prepared.tiles[count - 1]
            collector.add(count - 1, collector.search(tile, found))
    if count != total:
        raise ValueError(f"{count} candidate sets for {total} tiles")
    return collector.merge()
