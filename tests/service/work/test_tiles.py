from __future__ import annotations

import numpy as np
import pytest

from pipeline.model_config import ModelConfig, RepositoryConfig
from pipeline.postprocess import postprocess, postprocess_tile
from pipeline.preprocess import prepare
from pipeline.types import Candidates, Tile
from service.work.tiles import merge_found
from tests.support.blob_model import CLASSES, STRIDE, build_graph, draw_picture, model_config


@pytest.fixture
def config() -> ModelConfig:
    return RepositoryConfig.model_validate(model_config(build_graph())).for_version(1)


def find_colours(tile: Tile) -> Candidates:
    """What the graph of the blob model answers, in numpy."""
    height, width = (size // STRIDE for size in tile.image.shape[:2])
    blocks = tile.image.reshape(height, STRIDE, width, STRIDE, 3).mean((1, 3)) / 255
    probs = blocks.transpose(2, 0, 1).astype(np.float32)
    scores = (probs > 0.5).any((1, 2)).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    return Candidates(scores[order], np.arange(len(CLASSES))[order], probs[order])


@pytest.mark.parametrize("size", [(48, 48), (150, 200)])
@pytest.mark.parametrize("bound", [None, 1])
def test_tile_by_tile_is_what_the_whole_is(
    config: ModelConfig, size: tuple[int, int], bound: int | None
) -> None:
    boxes = {"red": (4, 4, 20, 20), "blue": (40, 30, size[1] - 50, 8)}
    prepared = prepare(draw_picture(*size, boxes), config.input)
    candidates = [find_colours(tile) for tile in prepared.tiles]
    spec = config.postprocess
    found = [
        postprocess_tile(tile, answer, prepared.image_hw, spec, max_instances=bound)
        for tile, answer in zip(prepared.tiles, candidates, strict=True)
    ]
    whole = postprocess(prepared, candidates, spec, max_instances=bound)
    assert merge_found(found, spec, bound) == whole
    assert len(whole) == (2 if bound is None and size == (150, 200) else 1)
