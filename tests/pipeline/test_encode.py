"""Instances as COCO results."""

from __future__ import annotations

import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline.draw import draw_instances, instance_colour
from pipeline.encode import (
    count_holes,
    decode_box,
    encode_index_png,
    encode_polygons,
    instance_to_coco,
)
from pipeline.model_config import ModelConfig
from pipeline.runs import BoxMask, build_instance
from pipeline.types import Detection

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


def _instance(pixels: np.ndarray, y: int = 3, x: int = 5) -> Detection:
    return build_instance(BoxMask(y, x, pixels.astype(bool)), (40, 50), 0, 0.8765432109)


def _blob(seed: int) -> Detection:
    """A mask with several components and holes, sometimes of the image's full height."""
    rng = np.random.default_rng(seed)
    height, width = (int(v) for v in rng.integers(1, 60, 2))
    noise = cv2.GaussianBlur(rng.random((height, width)), (0, 0), rng.uniform(0.3, 4))
    mask = noise >= np.quantile(noise, rng.uniform(0, 0.95))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return build_instance(BoxMask(int(rows[0]), int(columns[0]), box), (height, width), 0, 0.5)


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
    assert result["area"] == disc.sum()  # pycocotools sets the box's area in its own copy
    np.testing.assert_array_equal(loaded.annToMask(annotation)[3:18, 5:20], disc)


@pytest.mark.parametrize("seed", range(30))
def test_box_is_decoded_as_pycocotools_does(seed: int) -> None:
    instance = _blob(seed)
    x, y, width, height = instance.bbox_xywh
    expected = coco_mask.decode(instance.rle)[y : y + height, x : x + width]
    np.testing.assert_array_equal(decode_box(instance), expected)


def test_long_runs_are_decoded() -> None:
    pixels = np.zeros((3000, 40), np.bool_)
    pixels[5:2990, 3:38] = True
    pixels[17, 20] = False
    instance = build_instance(BoxMask(0, 0, pixels[5:2990, 3:38]), (2985, 35), 0, 0.5)
    np.testing.assert_array_equal(decode_box(instance), pixels[5:2990, 3:38])
    assert instance.area == pixels.sum()


@pytest.mark.parametrize("seed", range(30))
def test_polygons_give_the_same_mask_except_for_holes(seed: int) -> None:
    instance = _blob(seed)
    mask = coco_mask.decode(instance.rle)
    polygons = encode_polygons(instance)
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape)))
    contours, _ = cv2.findContours(
        np.ascontiguousarray(mask), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    filled = cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, -1)
    np.testing.assert_array_equal(drawn, filled)


def test_polygon_of_a_rectangle_is_its_four_corners() -> None:
    (polygon,) = encode_polygons(_instance(np.ones((4, 7))))
    corners = {(polygon[i], polygon[i + 1]) for i in range(0, 8, 2)}
    assert len(polygon) == 8 and corners == {(5, 3), (12, 3), (12, 7), (5, 7)}


def test_every_component_gets_a_polygon() -> None:
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


def test_none_omits_masks() -> None:
    assert "segmentation" not in instance_to_coco(_instance(np.ones((2, 2))), CONFIG, masks="none")


def test_drawing_changes_only_masked_pixels() -> None:
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


@pytest.mark.parametrize("seed", range(40))
def test_polygons_are_exact_where_there_are_no_holes(seed: int) -> None:
    instance = _blob(seed)
    height, width = instance.rle["size"]
    polygons = coco_mask.merge(coco_mask.frPyObjects(encode_polygons(instance), height, width))
    exact = bool((coco_mask.decode(polygons) == coco_mask.decode(instance.rle)).all())
    assert exact == (count_holes(instance) == 0)
    assert instance_to_coco(instance, CONFIG, masks="polygon")["holes"] == count_holes(instance)


def test_holes_are_counted() -> None:
    mask = np.ones((9, 9), bool)
    mask[2:4, 2:4] = mask[6, 6] = False
    assert count_holes(_instance(mask)) == 2
    mask[:, 6] = False  # no longer a hole: open at the border
    assert count_holes(_instance(mask)) == 1
    assert count_holes(_instance(np.ones((1, 1)))) == 0


@pytest.mark.parametrize("count", [0, 1, 255, 256, 300])
def test_the_index_png_has_the_best_instance_of_each_pixel(count: int) -> None:
    rng = np.random.default_rng(count)
    instances, expected = [], np.zeros((40, 50), np.int64)
    for number in range(1, count + 1):
        y, x = (int(v) for v in rng.integers(0, 30, 2))
        instance = _instance(rng.random((8, 9)) < 0.6, y, x)
        instances.append(instance)
        mask = coco_mask.decode(instance.rle) > 0
        expected[mask & (expected == 0)] = number
    image = Image.open(io.BytesIO(encode_index_png(instances, (40, 50))))
    assert image.mode == ("L" if count < 256 else "I;16")
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_more_than_65535_instances_are_rejected() -> None:
    with pytest.raises(ValueError, match="70000 instances"):
        encode_index_png([_instance(np.ones((1, 1)))] * 70_000, (4, 4))
