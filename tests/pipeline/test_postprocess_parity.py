"""The whole post-processing against the published implementation, to the last pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.model_config import MatrixNms, PostprocessSpec
from pipeline.postprocess import postprocess
from pipeline.types import Candidates, Detection, Prepared, Tile, Window

PARITY = Path(__file__).parents[1] / "data" / "parity"


def _run(head: str, nms: MatrixNms) -> tuple[dict[str, np.ndarray], list[Detection]]:
    with np.load(PARITY / f"final_{head}.npz") as file:
        data = dict(file)
    height, width = (int(v) for v in data["ori_shape"])
    canvas = np.zeros((*data["canvas_shape"], 3), np.uint8)
    valid = (int(data["img_shape"][0]), int(data["img_shape"][1]))
    prepared = Prepared((height, width), (Tile(canvas, valid, Window(0, 0, height, width)),))
    candidates = Candidates(data["cand_scores"], data["cand_labels"], data["cand_probs"])
    return data, postprocess(
        prepared, [candidates], PostprocessSpec(nms=nms, score_threshold=0.0, max_instances=100)
    ).instances


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("head", ["solo", "decoupled", "light"])
def test_scores_and_order(head: str, kernel: str) -> None:
    nms = MatrixNms.model_validate({"kernel": kernel})
    data, found = _run(head, nms)
    np.testing.assert_allclose([i.score for i in found], data[f"{kernel}0_scores"], atol=1e-6)
    assert [i.label for i in found] == data[f"{kernel}0_labels"].tolist()


@pytest.mark.parametrize("head", ["solo", "decoupled", "light"])
def test_every_pixel_of_the_final_masks(head: str) -> None:
    data, found = _run(head, MatrixNms())
    width = int(data["ori_shape"][1])
    expected = np.unpackbits(data["gaussian0_masks_packed"], axis=-1)[..., :width]
    got = np.stack([coco_mask.decode(instance.rle) for instance in found])
    np.testing.assert_array_equal(got, expected)
