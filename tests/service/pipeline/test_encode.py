"""Instances as COCO results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from service.pipeline.draw import draw_instances, instance_colour
from service.pipeline.encode import instance_to_coco
from service.pipeline.model_config import ModelConfig
from service.pipeline.paste import BoxMask, build_instance
from service.pipeline.types import Instance

CONFIG = ModelConfig.model_validate(
    {
        "name": "cells",
        "version": 1,
        "input": {"resize": {"rule": "tile", "scale": 1, "tile_hw": [64, 64], "overlap_px": 8}},
        "classes": [{"category_id": 7, "name": "cell"}],
        "candidates": 10,
        "mask_stride": 4,
        "postprocess": {"nms": {"kind": "matrix"}},
        "files": {"model.onnx": {"sha256": "0" * 64, "bytes": 1}},
    }
)


def _instance(pixels: np.ndarray, y: int = 3, x: int = 5) -> Instance:
    return build_instance(BoxMask(y, x, pixels.astype(bool)), (40, 50), 0, 0.8765432109)


def test_rle_result_loads_into_pycocotools() -> None:
    disc = np.hypot(*(np.mgrid[:15, :15] - 7)) <= 7
    result = json.loads(json.dumps(instance_to_coco(_instance(disc), CONFIG)))
    assert result["category_id"] == 7 and result["category"] == "cell"
    assert result["score"] == 0.876543
    assert result["bbox"] == [5, 3, 15, 15]
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": 1, "height": 40, "width": 50}],
        "categories": [{"id": 7, "name": "cell"}],
        "annotations": [],
    }
    truth.createIndex()
    loaded = truth.loadRes([{"image_id": 1, **result}])
    (annotation,) = loaded.loadAnns(loaded.getAnnIds())
    assert result["area"] == disc.sum()  # pycocotools puts the box's area into its own copy
    np.testing.assert_array_equal(loaded.annToMask(annotation)[3:18, 5:20], disc)


def test_polygon_covers_about_the_mask() -> None:
    disc = np.hypot(*(np.mgrid[:15, :15] - 7)) <= 7
    (polygon,) = instance_to_coco(_instance(disc), CONFIG, masks="polygon")["segmentation"]
    points = np.array(polygon).reshape(-1, 2)
    assert points.min(axis=0).tolist() == [5, 3] and points.max(axis=0).tolist() == [19, 17]


def test_every_part_gets_its_polygon() -> None:
    parts = np.zeros((10, 10), bool)
    parts[:3, :3] = parts[6:, 6:] = True
    polygons = instance_to_coco(_instance(parts), CONFIG, masks="polygon")["segmentation"]
    assert len(polygons) == 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1)])
def test_tiny_masks_have_valid_polygons(shape: tuple[int, int]) -> None:
    (polygon,) = instance_to_coco(_instance(np.ones(shape)), CONFIG, masks="polygon")[
        "segmentation"
    ]
    assert len(polygon) >= 6
    assert coco_mask.frPyObjects([polygon], 40, 50)


def test_none_leaves_masks_out() -> None:
    assert "segmentation" not in instance_to_coco(_instance(np.ones((2, 2))), CONFIG, masks="none")


def test_drawing_changes_masked_pixels_alone() -> None:
    image = np.full((40, 50, 3), 90, np.uint8)
    instance = _instance(np.ones((6, 6)))
    drawn = draw_instances(image, [instance])
    changed = (drawn != image).any(axis=2)
    np.testing.assert_array_equal(changed, coco_mask.decode(instance.rle) > 0)
    assert (image == 90).all()


def test_drawing_nothing_returns_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    np.testing.assert_array_equal(draw_instances(image, []), image)


def test_colours_differ() -> None:
    assert len({instance_colour(i) for i in range(100)}) == 100
