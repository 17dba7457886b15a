from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from training.configs.schema import BackboneConfig
from training.model.norm import FrozenBatchNorm
from training.model.resnet import ResNet

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def torchvision_state(depth: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's resnet{depth} without its classifier, written down."""
    state: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        for key in BATCH_NORM:
            state[f"{name}.{key}"] = () if key == "num_batches_tracked" else (channels,)

    state["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    channels = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        width = 64 * 2**stage
        out = width if depth < 50 else 4 * width
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            if depth < 50:
                convs = [(width, channels, 3, 3), (width, width, 3, 3)]
            else:
                convs = [(width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            for i, shape in enumerate(convs, 1):
                state[f"{name}.conv{i}.weight"] = shape
                norm(f"{name}.bn{i}", shape[0])
            if block == 0 and (stage > 0 or channels != out):
                state[f"{name}.downsample.0.weight"] = (out, channels, 1, 1)
                norm(f"{name}.downsample.1", out)
            channels = out
    return state


# Parameters of torchvision's models less those of their classifiers (fc).
PARAMETERS = {
    18: 11_689_512 - 513_000,
    34: 21_797_672 - 513_000,
    50: 25_557_032 - 2_049_000,
    101: 44_549_160 - 2_049_000,
}


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_names_and_shapes_are_torchvisions(depth: int, norm: str) -> None:
    with torch.device("meta"):
        model = ResNet(BackboneConfig(depth=depth, norm=norm))  # type: ignore[arg-type]
    found = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert found == torchvision_state(depth)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[depth]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("size", [(64, 96), (96, 32)])
def test_strides_and_channels(depth: int, size: tuple[int, int]) -> None:
    model = ResNet(BackboneConfig(depth=depth, base_width=4, norm="gn"))  # type: ignore[arg-type]
    features = model(torch.zeros(1, 3, *size))
    assert [f.shape[1] for f in features] == list(model.out_channels)
    for feature, stride in zip(features, (4, 8, 16, 32), strict=True):
        assert feature.shape[-2:] == (size[0] // stride, size[1] // stride)


def test_the_stride_of_a_bottleneck_sits_in_its_3x3_convolution() -> None:
    with torch.device("meta"):
        block = ResNet(BackboneConfig(depth=50)).get_submodule("layer2.0")
    strides = {n: m.stride for n, m in block.named_children() if isinstance(m, nn.Conv2d)}
    assert strides == {"conv1": (1, 1), "conv2": (2, 2), "conv3": (1, 1)}


@pytest.mark.parametrize("frozen", [0, 1, 2, 4])
def test_frozen_stages_have_no_gradients(frozen: int) -> None:
    with torch.device("meta"):
        model = ResNet(BackboneConfig(depth=18, frozen_stages=frozen))
    expected = {"conv1", "bn1"} if frozen else set()
    expected |= {f"layer{i}" for i in range(1, frozen + 1)}
    fixed = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert fixed == expected
    assert not fixed & trained


def test_frozen_batch_norm_stays_in_evaluation_mode_and_trains_its_affine() -> None:
    model = ResNet(BackboneConfig(depth=18, base_width=4, frozen_stages=0))
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(isinstance(m, FrozenBatchNorm) and not m.training for m in norms)
    before = {k: v.clone() for k, v in model.named_buffers()}
    model(torch.randn(2, 3, 64, 64))[-1].sum().backward()
    for key, value in model.named_buffers():
        assert torch.equal(value, before[key]), key
    assert all(m.weight.grad is not None for m in norms)


def test_batch_norm_trains_its_statistics() -> None:
    model = ResNet(BackboneConfig(depth=18, base_width=4, norm="bn", frozen_stages=0)).train()
    before = model.bn1.running_mean.clone()  # type: ignore[operator]
    model(torch.randn(2, 3, 64, 64))
    assert not torch.equal(before, model.bn1.running_mean)  # type: ignore[arg-type]


def test_group_norm_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    model = ResNet(BackboneConfig(depth=18, base_width=8, norm="gn", frozen_stages=0)).train()
    x = torch.randn(2, 3, 64, 64)
    both, alone = model(x)[-1][:1], model(x[:1])[-1]
    torch.testing.assert_close(both, alone)


def test_an_unknown_depth_is_named() -> None:
    with pytest.raises(ValueError, match="152"):
        ResNet(BackboneConfig(depth=152))  # type: ignore[arg-type]


@pytest.mark.parametrize("stages", [(2, 3, 4), (4,), (1,)])
def test_deformable_stages_add_offsets_to_their_3x3_convolutions_alone(
    stages: tuple[int, ...],
) -> None:
    with torch.device("meta"):
        model = ResNet(BackboneConfig(depth=101, deformable_stages=stages))
    expected = torchvision_state(101)
    for stage in stages:
        for block in range(BLOCKS[101][stage - 1]):
            name = f"layer{stage}.{block}.conv2.conv_offset"
            expected[f"{name}.weight"] = (18, 64 * 2 ** (stage - 1), 3, 3)
            expected[f"{name}.bias"] = (18,)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected


def test_a_new_deformable_backbone_computes_what_a_plain_one_would() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(depth=50, base_width=4, deformable_stages=(2, 3, 4))
    model = ResNet(config).double()
    plain = ResNet(replace(config, deformable_stages=())).double()
    state = model.state_dict()
    assert all(not value.any() for key, value in state.items() if "conv_offset" in key)
    plain.load_state_dict({k: v for k, v in state.items() if "conv_offset" not in k})
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    for found, expected in zip(model(x), plain(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("depth", [18, 34])
def test_blocks_without_a_deformable_form_are_refused(depth: int) -> None:
    message = rf"deformable_stages is \(2, 3\), but the blocks of depth {depth}"
    with pytest.raises(ValueError, match=message):
        BackboneConfig(depth=depth, deformable_stages=(2, 3))  # type: ignore[arg-type]
