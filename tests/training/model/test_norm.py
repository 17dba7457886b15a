from __future__ import annotations

import pytest
from torch import nn

from training.model.norm import FrozenBatchNorm, build_norm


def test_an_unknown_norm_is_named() -> None:
    with pytest.raises(ValueError, match="layernorm"):
        build_norm("layernorm")


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("frozen_bn", FrozenBatchNorm), ("bn", nn.BatchNorm2d), ("gn", nn.GroupNorm)],
)
def test_the_epsilon_is_that_of_the_backbone(kind: str, layer: type[nn.Module]) -> None:
    norm = build_norm(kind, 1e-3)(16)
    assert type(norm) is layer and norm.eps == 1e-3
    assert build_norm(kind)(16).eps == 1e-5


@pytest.mark.parametrize(
    ("channels", "groups"), [(64, 16), (128, 32), (512, 32), (8, 2), (144, 16), (40, 10), (3, 3)]
)
def test_groups_divide_the_channels(channels: int, groups: int) -> None:
    norm = build_norm("gn")(channels)
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == groups
