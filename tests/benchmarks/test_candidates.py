from __future__ import annotations

import numpy as np
import pytest

from benchmarks.candidates import PER_OBJECT, STRIDE, draw_candidates


def test_objects_have_the_sizes_of_coco() -> None:
    _, candidates = draw_candidates((480, 640), 150)
    areas = (candidates.mask_probs[:150] > 0.5).sum(axis=(1, 2)) * STRIDE**2 / (800 / 480) ** 2
    small, large = np.mean(areas < 32**2), np.mean(areas > 96**2)
    assert small == pytest.approx(0.41, abs=0.1)
    assert large == pytest.approx(0.24, abs=0.1)


def test_candidates_are_ranked_soft_and_many() -> None:
    _, candidates = draw_candidates((100, 150), 8)
    assert candidates.mask_probs.shape == (8 * PER_OBJECT, 200, 304)
    assert (np.diff(candidates.scores) < 0).all()
    assert candidates.mask_probs.min() >= 0 and candidates.mask_probs.max() <= 1
    between = (candidates.mask_probs > 0.1) & (candidates.mask_probs < 0.9)
    assert between.any(axis=(1, 2)).mean() > 0.9
