from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from training.model.fpn import FPN, SingleLevel

CHANNELS = (4, 8, 16, 32)


def features(height: int = 64, width: int = 96) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, c, -(-height // s), -(-width // s))
        for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_levels(levels: int) -> None:
    outs = FPN(CHANNELS, 6, levels)(features())
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert [tuple(o.shape) for o in outs] == [(2, 6, *size) for size in sizes[:levels]]


def test_against_the_papers_formula() -> None:
    torch.manual_seed(1)
    fpn, c = FPN(CHANNELS, 6), features()
    p5 = fpn.lateral_convs[3](c[3])
    p4 = fpn.lateral_convs[2](c[2]) + F.interpolate(p5, scale_factor=2.0)
    outs = fpn(c)
    torch.testing.assert_close(outs[3], fpn.output_convs[3](p5))
    torch.testing.assert_close(outs[2], fpn.output_convs[2](p4))
    torch.testing.assert_close(outs[4], outs[3][..., ::2, ::2])


def test_fewer_levels_still_carry_the_coarse_features() -> None:
    fpn, c = FPN(CHANNELS, 6, 1), features()
    before = fpn(c)[0]
    c[3] = c[3] + 1
    assert not torch.equal(before, fpn(c)[0])


def test_sizes_that_do_not_divide() -> None:
    outs = FPN(CHANNELS, 6)(features(72, 104))
    assert [tuple(o.shape[-2:]) for o in outs] == [(18, 26), (9, 13), (5, 7), (3, 4), (2, 2)]


@pytest.mark.parametrize("levels", [0, 6])
def test_an_impossible_number_of_levels_is_named(levels: int) -> None:
    with pytest.raises(ValueError, match=str(levels)):
        FPN(CHANNELS, 6, levels)


def test_single_level_merges_c3_to_c5_at_stride_8() -> None:
    torch.manual_seed(1)
    neck, c = SingleLevel(CHANNELS, 6), features()
    (out,) = neck(c)
    assert neck.first_stride == 8 and out.shape == (2, 6, 8, 12)
    c3, c4, c5 = (conv(x) for conv, x in zip(neck.lateral_convs, c[1:], strict=True))
    merged = c3 + sum(
        F.interpolate(x, scale_factor=s, mode="bilinear") for x, s in ((c4, 2), (c5, 4))
    )
    torch.testing.assert_close(out, neck.output_conv(merged))


@pytest.mark.parametrize(("level", "counts"), [(0, False), (1, True), (2, True), (3, True)])
def test_single_level_sees_c3_c4_and_c5(level: int, counts: bool) -> None:
    neck, c = SingleLevel(CHANNELS, 6), features()
    before = neck(c)[0]
    c[level] = c[level] + 1
    assert torch.equal(before, neck(c)[0]) != counts


def test_single_level_of_sizes_that_do_not_divide() -> None:
    (out,) = SingleLevel(CHANNELS, 6)(features(72, 104))
    assert out.shape == (2, 6, 9, 13)


@pytest.mark.parametrize("kind", [FPN, SingleLevel])
def test_every_weight_of_a_neck_gets_a_gradient(kind: type[FPN] | type[SingleLevel]) -> None:
    neck = kind(CHANNELS, 6)
    sum(out.square().sum() for out in neck(features())).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
