from __future__ import annotations

import pytest

from benchmarks.cases.flops import CANVASES, count_flops, count_layers, count_mask_bytes


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


@pytest.mark.parametrize("name", ["tiny_vanilla", "tiny_decoupled", "solo_512_r50"])
def test_layers_add_up_to_the_network(name: str) -> None:
    canvas_hw = (64, 96)
    layers = count_layers(name, canvas_hw)
    total = count_flops(name, canvas_hw)["total"]
    assert sum(layer.gflop for layer in layers.values()) == pytest.approx(total, rel=1e-6)
    assert min(layer.values for layer in layers.values()) > 0
    for part, layer in layers.items():
        assert (layer.gflop == layer.paper_gflop) == (
            part != "mask output" or name == "tiny_decoupled"
        )


def test_a_convolution_is_counted_as_on_paper() -> None:
    """The stem of ResNet-50: 7x7, 3 to 64 channels, stride 2; SOLO's dense masks of all cells."""
    layers = count_layers("solo_512_r50", (64, 96))
    assert layers["backbone conv1"].gflop * 1e9 == 2 * 32 * 48 * 64 * 3 * 49
    values = 64 * 96 * 3 + 64 * 3 * 49 + 32 * 48 * 64
    assert layers["backbone conv1"].values * 1e6 == pytest.approx(values)
    dense = 40**2 + 36**2 + 24**2 / 4 + (16**2 + 12**2) / 16
    assert layers["mask output"].paper_gflop * 1e9 == pytest.approx(2 * 16 * 24 * 256 * dense)
    assert layers["category tower"].calls == layers["mask tower"].calls == 5 * 7
