from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.harness import BenchmarkError
from benchmarks.pipeline_ways import build_stages


@pytest.mark.parametrize("image_hw", [(60, 80), (1000, 1500)])
def test_all_ways_of_all_stages_come_to_the_same(image_hw: tuple[int, int]) -> None:
    for stage in build_stages(image_hw, [3]):
        differences = stage.find_differences()
        assert differences.keys() == stage.ways.keys() - {"ours"}


def test_a_way_that_comes_to_something_else_is_refused() -> None:
    stage = next(build_stages((60, 80), []))
    other = {**stage.ways, "Pillow": lambda: np.zeros((60, 80, 3), np.uint8)}
    with pytest.raises(BenchmarkError, match=r"Pillow differs by .* grey levels"):
        replace(stage, ways=other).find_differences()
