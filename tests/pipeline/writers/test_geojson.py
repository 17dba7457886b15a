from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import shapely
from shapely.geometry import shape

from pipeline.writers import FORMATS
from tests.support.found import CLASSES, NAMES, Mask, build_page, fill_rings, to_mask


def write(**fields: Any) -> list[dict[str, Any]]:
    content = json.loads(FORMATS["geojson"].encode(build_page(**fields)))
    assert content["type"] == "FeatureCollection"
    features: list[dict[str, Any]] = content["features"]
    return features


def draw(geometry: dict[str, Any], hw: tuple[int, int]) -> Mask:
    multi = geometry["type"] == "MultiPolygon"
    parts = geometry["coordinates"] if multi else [geometry["coordinates"]]
    return fill_rings((np.array(ring) for part in parts for ring in part), hw)


def test_geometries_are_valid_and_give_the_same_masks() -> None:
    page = build_page(20)
    features = write(count=20)
    assert len(features) == 20
    for feature, instance in zip(features, page.instances, strict=True):
        geometry = shape(feature["geometry"])
        assert geometry.is_valid, shapely.is_valid_reason(geometry)
        np.testing.assert_array_equal(draw(feature["geometry"], (40, 50)), to_mask(instance))
    kinds = {feature["geometry"]["type"] for feature in features}
    assert kinds == {"Polygon", "MultiPolygon"}
    assert len(features[1]["geometry"]["coordinates"]) == 3  # the ring's two holes touch


def test_features_have_the_fields_that_qupath_reads() -> None:
    properties = [feature["properties"] for feature in write(um_per_px=0.5)]
    for item, spec in zip(properties, (*CLASSES, CLASSES[0]), strict=True):
        assert item["objectType"] == "detection"
        assert item["classification"]["name"] == spec.name
        assert all(0 <= part <= 255 for part in item["classification"]["color"])
    assert properties[0]["measurements"] == {"Score": 1.0, "Area px^2": 1, "Area µm^2": 0.25}
    assert properties[0]["classification"]["color"] != properties[1]["classification"]["color"]


def test_without_instances_the_collection_is_empty() -> None:
    assert write(count=0) == []


@pytest.mark.parametrize("name", NAMES)
def test_any_class_name_comes_back(name: str) -> None:
    classes = tuple(spec.model_copy(update={"name": name}) for spec in CLASSES)
    found = write(classes=classes)
    assert {item["properties"]["classification"]["name"] for item in found} == {name}
