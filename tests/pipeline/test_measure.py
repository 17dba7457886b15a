from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.measure import regionprops_table

from pipeline.measure import COLUMNS, measure_shape
from tests.support.found import draw_blobs, to_instance

PROPERTIES = sorted({name.partition("-")[0] for name in COLUMNS})


def check(mask: np.ndarray) -> None:
    found = measure_shape(to_instance(mask))
    filled = mask.astype(np.uint8)
    expected = regionprops_table(filled, properties=PROPERTIES)  # type: ignore[no-untyped-call, unused-ignore]
    assert tuple(found) == COLUMNS and set(expected) == set(COLUMNS)
    for name, (value,) in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-7), name


@pytest.mark.parametrize("seed", range(40))
def test_shapes_are_measured_as_scikit_image_does(seed: int) -> None:
    check(draw_blobs(seed))


@pytest.mark.parametrize("hw", [(1, 1), (1, 9), (9, 1), (2, 2), (30, 31)])
def test_full_frames_are_measured_as_scikit_image_does(hw: tuple[int, int]) -> None:
    check(np.ones(hw, bool))


@pytest.mark.parametrize("flip", [False, True])
def test_diagonals_are_measured_as_scikit_image_does(flip: bool) -> None:
    diagonal = np.eye(12, dtype=bool)
    check(diagonal[::-1] if flip else diagonal)


def test_a_large_disc_is_round_and_solid() -> None:
    disc = np.hypot(*(np.mgrid[:1201, :1201] - 600)) <= 600
    found = measure_shape(to_instance(disc))
    assert found["equivalent_diameter_area"] == pytest.approx(1200, rel=1e-3)
    assert found["eccentricity"] < 0.02 and 0.99 < found["solidity"] <= 1
    assert found["centroid-0"] == pytest.approx(600)
    assert found["area"] == disc.sum() == pytest.approx(math.pi * 600**2, rel=1e-3)
