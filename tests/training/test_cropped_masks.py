from __future__ import annotations

import numpy as np
import pytest

from training.cropped_masks import CroppedMasks


def test_cropped_masks_as_an_array() -> None:
    masks = CroppedMasks((4, 6), np.float32)
    assert np.asarray(masks).shape == masks.shape == (0, 4, 6)
    assert masks.append(np.zeros((2, 2), np.float32), 1, 3) == (0, 0, 0, 0)
    assert masks.append(np.array([[0, 0.25], [0, 0.5]], np.float32), 1, 3) == (4, 1, 1, 2)
    whole = np.zeros((2, 4, 6), np.float32)
    whole[1, 1:3, 4] = 0.25, 0.5
    np.testing.assert_array_equal(masks, whole)
    assert np.asarray(masks).dtype == np.float32 and masks.nbytes == 8
    assert np.asarray(masks, np.float64).dtype == np.float64
    np.testing.assert_array_equal(masks[-1], whole[1])
    with pytest.raises(IndexError):
        masks[2]
