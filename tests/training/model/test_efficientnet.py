from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training.configs.schema import BackboneConfig
from training.model.efficientnet import (
    STAGES,
    EfficientNetLite0,
    InvertedResidual,
    pad_same,
    scale_channels,
)
from training.model.norm import build_norm

PARAMETERS = 4_652_008 - (320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000)
"""Of the published classifier, less those of its last convolution, batch norm and output."""
BLOCKS_OF_STAGES = {1: range(3), 2: range(3, 5), 3: range(5, 11), 4: range(11, 16)}


def build(base_width: int = 8, **more: object) -> EfficientNetLite0:
    settings = {"norm": "bn", "frozen_stages": 0, **more}
    torch.manual_seed(0)
    return EfficientNetLite0(
        BackboneConfig(kind="efficientnet_lite0", base_width=base_width, **settings)  # type: ignore[arg-type]
    )


def test_the_published_width_has_the_published_number_of_parameters() -> None:
    model = build(32)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    assert model.out_channels == (24, 40, 112, 320)
    assert len(model.blocks) == 16


@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_strides_and_channels(size: tuple[int, int]) -> None:
    model = build().eval()
    features = model(torch.zeros(1, 3, *size))
    assert [f.shape[1] for f in features] == list(model.out_channels)
    for feature, stride in zip(features, (4, 8, 16, 32), strict=True):
        assert feature.shape[-2:] == (size[0] // stride, size[1] // stride)


@pytest.mark.parametrize(
    ("channels", "base_width", "expected"),
    [(320, 32, 320), (24, 32, 24), (16, 8, 8), (112, 16, 56), (24, 16, 16), (40, 48, 64)],
)
def test_channels_of_other_widths(channels: int, base_width: int, expected: int) -> None:
    assert scale_channels(channels, base_width) == expected


def padded_as_tensorflow(x: torch.Tensor, kernel: int) -> torch.Tensor:
    """The rule for any size: as much as the last window needs, the odd pixel at the end."""
    pads: list[int] = []
    for side in (x.shape[-1], x.shape[-2]):
        total = max((-(-side // 2) - 1) * 2 + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(2, 4), (18, 6)])
def test_padding_of_stride_2(kernel: int, size: tuple[int, int]) -> None:
    x = torch.randn(1, 2, *size)
    assert torch.equal(pad_same(x, kernel), padded_as_tensorflow(x, kernel))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_a_block_by_its_definition(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    norm = build_norm("bn", 1e-3)
    block = InvertedResidual(8, 8, expansion=6, kernel=kernel, stride=stride, norm=norm).eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.01, 2)  # type: ignore[arg-type]
    x = 4 * torch.randn(2, 8, 10, 14)

    def normalised(name: str, values: torch.Tensor) -> torch.Tensor:
        layer: Any = block.get_submodule(name)
        scale = layer.weight / (layer.running_var + 1e-3).sqrt()
        shift = layer.bias - layer.running_mean * scale
        out: torch.Tensor = values * scale[:, None, None] + shift[:, None, None]
        return out

    wide = normalised("bn0", F.conv2d(x, block.expand_conv.weight)).clamp(0, 6)
    assert (wide == 6).any(), "the bound of ReLU6 is reached"
    half = kernel // 2
    padded = padded_as_tensorflow(wide, kernel) if stride == 2 else F.pad(wide, [half] * 4)
    deep = F.conv2d(padded, block.depthwise_conv.weight, stride=stride, groups=48)
    deep = normalised("bn1", deep).clamp(0, 6)
    expected = normalised("bn2", F.conv2d(deep, block.project_conv.weight))
    expected = expected + x if stride == 1 else expected
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_only_blocks_that_keep_the_shape_add_their_input() -> None:
    model = build(32)
    counts = [group[4] for stage in STAGES for group in stage]
    expected = [index > 0 for count in counts for index in range(count)]
    assert [block.adds for block in model.blocks] == expected


@pytest.mark.parametrize("frozen", [0, 1, 2, 3, 4])
def test_frozen_stages_have_no_gradients(frozen: int) -> None:
    model = build(frozen_stages=frozen)
    expected = {"conv_stem", "bn0"} if frozen else set()
    for stage in range(1, frozen + 1):
        expected |= {f"blocks.{i}" for i in BLOCKS_OF_STAGES[stage]}

    def part(name: str) -> str:
        return ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])

    fixed = {part(n) for n, p in model.named_parameters() if not p.requires_grad}
    trained = {part(n) for n, p in model.named_parameters() if p.requires_grad}
    assert fixed == expected and not fixed & trained


def test_every_parameter_gets_a_gradient() -> None:
    model = build(norm="frozen_bn").train()
    sum(f.sum() for f in model(torch.randn(1, 3, 32, 32))).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("width", [8, 32])
def test_group_norm_fits_every_layer(width: int) -> None:
    model = build(width, norm="gn").eval()
    assert model(torch.zeros(1, 3, 32, 32))[-1].isfinite().all()


def test_deformable_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="the blocks of efficientnet_lite0 have no deformable"):
        BackboneConfig(kind="efficientnet_lite0", deformable_stages=(4,))


def test_on_a_cpu_the_depthwise_convolution_is_fp32_in_mixed_precision() -> None:
    torch.manual_seed(0)
    norm = build_norm("frozen_bn", 1e-3)
    block = InvertedResidual(8, 8, expansion=6, kernel=5, stride=1, norm=norm)
    seen: list[torch.dtype] = []
    block.depthwise_conv.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    x = torch.randn(1, 8, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(x)
    assert seen == [torch.float32] and mixed.dtype == torch.float32  # the input was added
    assert (mixed - block(x)).abs().max() < 0.05 * block(x).abs().max()
    mixed.sum().backward()
    assert block.depthwise_conv.weight.grad is not None
