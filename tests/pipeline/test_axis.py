"""The composed weights against the product of the two resize matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.axis import build_axis, linear_weights
from tests.support.dense_paste import axis_matrix


def test_weights_sum_to_one() -> None:
    assert axis_matrix(10, 4, 33, 71).sum(axis=1) == pytest.approx(1, abs=1e-5)
    low, weight = linear_weights(1, 5)
    assert not low.any() and not weight.any()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.floats(0, 1), st.integers(1, 400), st.booleans())
def test_weights_equal_the_matrix(
    size: int, stride: int, share: float, original: int, same: bool
) -> None:
    valid = max(1, round(share * size * stride))
    original = valid if same else original
    axis = build_axis(size, stride, valid, original)
    matrix = axis_matrix(size, stride, valid, original)
    built = np.zeros_like(matrix)
    for inputs, weights in zip(axis.inputs, axis.weights, strict=True):
        built[np.arange(original), inputs] += weights
    np.testing.assert_array_equal(built, matrix)
    used = matrix > 0
    for i in range(size + 1):
        assert axis.before[i] == np.count_nonzero(~used[:, i:].any(axis=1))
        assert axis.after[i] == np.count_nonzero(used[:, :i].any(axis=1))


def test_an_axis_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        build_axis(4, 4, 16, 20).weights[0, 0] = 1
