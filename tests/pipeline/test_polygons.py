from __future__ import annotations

import numpy as np
import pytest
import shapely

from pipeline.polygons import connect, simplify, trace_outlines, trace_parts
from tests.support.found import draw_blobs, fill_rings, merge_polygons


def as_shape(parts: list[list[np.ndarray]]) -> shapely.MultiPolygon:
    return shapely.MultiPolygon([(part[0], part[1:]) for part in parts])


@pytest.mark.parametrize("seed", range(40))
def test_parts_are_valid_and_give_the_same_mask(seed: int) -> None:
    mask = draw_blobs(seed)
    parts = trace_parts(mask.astype(np.uint8), (0, 0))
    shape = as_shape(parts)
    assert shape.is_valid, shapely.is_valid_reason(shape)
    assert shape.area == mask.sum()
    drawn = fill_rings((ring for part in parts for ring in part), mask.shape)
    np.testing.assert_array_equal(drawn, mask)


@pytest.mark.parametrize("seed", range(40))
def test_rings_that_are_connected_enclose_the_same_pixels(seed: int) -> None:
    mask = draw_blobs(seed)
    rings = [ring for part in trace_parts(mask.astype(np.uint8), (0, 0)) for ring in part]
    drawn = merge_polygons([connect(rings).ravel().tolist()], mask.shape)
    np.testing.assert_array_equal(drawn, mask)


def test_pixels_that_touch_at_a_corner_are_two_parts_but_one_outline() -> None:
    mask = np.eye(2, dtype=np.uint8)
    assert len(trace_parts(mask, (0, 0))) == 2
    (outline,) = trace_outlines(mask, (10, 20))
    assert outline.min(axis=0).tolist() == [10, 20] and outline.max(axis=0).tolist() == [12, 22]


def test_a_hole_that_touches_the_outside_at_a_corner_stays_a_hole() -> None:
    mask = np.ones((4, 4), np.uint8)
    mask[0, 0] = mask[1, 1] = 0
    (part,) = trace_parts(mask, (0, 0))
    assert len(part) == 2 and as_shape([part]).is_valid


def test_outer_rings_and_holes_run_in_opposite_directions() -> None:
    mask = np.ones((5, 7), np.uint8)
    mask[2, 2] = mask[2, 4] = 0
    (part,) = trace_parts(mask, (3, 4))
    signed = [shapely.LinearRing(ring).is_ccw for ring in part]
    assert signed == [True, False, False]
    assert part[0].min(axis=0).tolist() == [3, 4]


def test_an_empty_mask_has_no_outlines() -> None:
    empty = np.zeros((3, 3), np.uint8)
    assert trace_parts(empty, (0, 0)) == [] and trace_outlines(empty, (0, 0)) == []


def test_simplified_rings_are_near_and_keep_an_area() -> None:
    disc = (np.hypot(*(np.mgrid[:41, :41] - 20)) <= 20).astype(np.uint8)
    ((ring,),) = trace_parts(disc, (0, 0))
    assert simplify(ring, 0) is ring
    fewer = simplify(ring, 1.5)
    assert 8 <= len(fewer) < len(ring) / 3
    exact, rough = shapely.Polygon(ring), shapely.Polygon(fewer)
    assert exact.hausdorff_distance(rough) <= 1.5
    ((pixel,),) = trace_parts(np.ones((1, 1), np.uint8), (0, 0))
    assert len(simplify(pixel, 50)) == 4


def test_thousands_of_parts_are_traced_and_connected() -> None:
    mask = np.zeros((120, 120), np.uint8)
    mask[::2, ::2] = 1
    parts = trace_parts(mask, (0, 0))
    assert len(parts) == 3600
    one = connect([part[0] for part in parts])
    np.testing.assert_array_equal(merge_polygons([one.ravel().tolist()], (120, 120)), mask > 0)
