from __future__ import annotations

import numpy as np

from pipeline.writers.outline import outline_as_one, outline_if_simple, outline_parts
from tests.support.found import to_instance


def test_only_one_part_without_holes_is_simple() -> None:
    mask = np.zeros((8, 9), bool)
    mask[1:7, 2:8] = True
    whole = outline_if_simple(to_instance(mask), 0)
    assert whole is not None and sorted(map(tuple, whole.tolist())) == [
        (2, 1),
        (2, 7),
        (8, 1),
        (8, 7),
    ]
    mask[3, 4] = False
    assert outline_if_simple(to_instance(mask), 0) is None
    mask[3, 4], mask[4, 2:8] = True, False
    assert outline_if_simple(to_instance(mask), 0) is None
    assert [len(part) for part in outline_parts(to_instance(mask), 0)] == [1, 1]
    assert len(outline_as_one(to_instance(mask), 0)) == 10
