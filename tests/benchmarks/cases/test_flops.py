from __future__ import annotations

import pytest

from benchmarks.cases.flops import CANVASES, count_flops, count_mask_bytes


def test_parts_add_up_and_follow_the_canvas() -> None:
    small, large = (count_flops("tiny_vanilla", hw) for hw in ((64, 64), (128, 64)))
    for counts in (small, large):
        parts = sum(value for part, value in counts.items() if part != "total")
        assert parts == pytest.approx(counts["total"])
    assert large["backbone"] == pytest.approx(2 * small["backbone"])
    assert large["head_category"] == pytest.approx(small["head_category"])  # S x S, any canvas
    # One convolution of the tower, 16 to 16 channels, and the output for 3 classes; both 3x3.
    cells = 8**2 + 5**2
    assert small["head_category"] * 1e9 == pytest.approx(cells * 2 * 9 * 16 * (16 + 3))


def test_mask_bytes_are_those_of_the_graphs_output() -> None:
    height, width = CANVASES["solo_r50"]
    found = count_mask_bytes("solo_r50", (height, width), 4)
    assert found["output"] * 1e6 == 500 * (height // 4) * (width // 4) * 4
    assert found["logits"] == pytest.approx(found["output"] * (1 + 1 + 1 / 4 + 2 / 16))
    assert count_mask_bytes("decoupled_solo_r50", (height, width), 4)["logits"] == 0
