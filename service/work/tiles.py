"""Post-processing tile by tile, so that a large image never has all its masks in memory."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.merge import TileInstance, merge_tiles
from pipeline.model_config import PostprocessSpec
from pipeline.types import Instance


def merge_found(
    found: Sequence[Sequence[TileInstance]], spec: PostprocessSpec, max_instances: int | None
) -> list[Instance]:
    """Instances of an image from those of its tiles, as `postprocess` does it.

    Args:
        found: One entry a tile, each from `postprocess_tile`.
        spec: The model's post-processing.
        max_instances: Most instances returned; None takes that of `spec`.
    """
    if len(found) == 1:
        return [entry.instance for entry in found[0]]
    bound = spec.max_instances if max_instances is None else max_instances
    entries = [entry for tile in found for entry in tile]
    return merge_tiles(entries, max_instances=bound, compare=spec.compare)
