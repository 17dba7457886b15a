from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.configs.schema import HeadConfig, HeadKind
from training.model.deform import DeformConv2d
from training.model.head import (
    REGION_SAMPLES,
    SoloHead,
    align_to_grid,
    coordinate_channels,
    prior_bias,
    resize_levels,
)

KINDS: list[HeadKind] = ["vanilla", "decoupled", "decoupled_light"]
SMALL = HeadConfig(channels=8, num_convs=2, norm_groups=2, num_grids=(7, 6, 5, 4, 3))


def pyramid(height: int = 64, width: int = 96, levels: int = 5) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 6, -(-height // s), -(-width // s)) for s in (4, 8, 16, 32, 64)][:levels]


def build(**changes: Any) -> SoloHead:
    torch.manual_seed(1)
    head = SoloHead(replace(SMALL, **changes), 6, 3)
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
    return head


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: str) -> None:
    outputs = build(kind=kind)(pyramid())
    sizes = [(16, 24), (16, 24), (8, 12), (4, 6), (4, 6)]
    for output, grid, size in zip(outputs, SMALL.num_grids, sizes, strict=True):
        assert output.category_logits.shape == (2, 3, grid, grid)
        channels = 8 if kind == "vanilla" else grid
        assert [m.shape for m in output.mask_inputs] == [(2, channels, *size)] * (
            1 if kind == "vanilla" else 2
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grids", [(1, 1), (13, 2), (80, 40)])
def test_any_grids(kind: str, grids: tuple[int, int]) -> None:
    head = build(
        kind=kind,
        num_grids=grids,
        level_strides=(8, 8),
        mask_strides=(4, 4),
        scale_ranges=((1, 50), (30, 2000)),
    )
    outputs = head(pyramid(levels=2))
    for level, (output, grid) in enumerate(zip(outputs, grids, strict=True)):
        assert output.category_logits.shape[-1] == grid
        last = torch.tensor([grid * grid - 1])
        logits = head.cell_logits(output, level, 1, last)
        assert all(mask.shape == (1, 16, 24) for mask in logits)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_chosen_cells_are_those_of_the_whole_output(kind: str) -> None:
    head = build(kind=kind)
    for level, output in enumerate(head(pyramid())):
        grid = SMALL.num_grids[level]
        cells = torch.tensor([0, grid + 1, grid * grid - 1, 1])
        found = head.cell_logits(output, level, 1, cells)
        if kind == "vanilla":
            whole = head.mask_out[level](output.mask_inputs[0])[1]
            torch.testing.assert_close(found[0], whole[cells], rtol=1e-5, atol=1e-5)
        else:
            x, y = output.mask_inputs
            torch.testing.assert_close(found[0], x[1, [0, 1, grid - 1, 1]])
            torch.testing.assert_close(found[1], y[1, [0, 1, grid - 1, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_no_cells_give_no_masks(kind: str) -> None:
    head = build(kind=kind)
    none = torch.zeros(0, dtype=torch.int64)
    for mask in head.cell_logits(head(pyramid())[0], 0, 0, none):
        assert mask.shape == (0, 16, 24)


def test_the_towers_are_shared_and_only_the_mask_outputs_are_not() -> None:
    head = build()
    names = {name.split(".")[0] for name in head.state_dict()}
    assert names == {"category_convs", "category_out", "mask_convs", "mask_out"}
    assert [conv.out_channels for conv in head.mask_out] == [s * s for s in SMALL.num_grids]
    decoupled = build(kind="decoupled")
    assert decoupled.mask_convs_x[0].conv.in_channels == 7  # type: ignore[union-attr]
    light = build(kind="decoupled_light")
    assert light.mask_convs[0].conv.in_channels == 8  # type: ignore[union-attr]
    assert {c.kernel_size for c in light.mask_out_x} == {(3, 3)}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_coordinates_enter_the_first_convolutions(count: int) -> None:
    head = build(num_coord_convs=count)
    inputs = [conv.conv.in_channels for conv in head.mask_convs]  # type: ignore[union-attr]
    assert inputs == [6 + 2 * (count > 0), 8 + 2 * (count > 1)]
    assert head.category_convs[0].conv.in_channels == 6  # type: ignore[union-attr]
    constant = [torch.ones_like(p) for p in pyramid()]
    mask = head(constant)[0].mask_inputs[0]
    inner = mask[0, :, 6:-6, 6:-6]
    spread = (inner.amax(dim=(1, 2)) - inner.amin(dim=(1, 2))).max().item()
    assert (spread > 1e-3) == (count > 0)


def test_levels_are_resized_as_published() -> None:
    p = pyramid()
    found = resize_levels(p, (8, 8, 16, 32, 32))
    half = F.interpolate(p[0], scale_factor=0.5, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[0], half)
    for level in (1, 2, 3):
        assert found[level] is p[level]
    wide = F.interpolate(p[4], size=p[3].shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[4], wide)


def test_a_level_can_keep_its_stride() -> None:
    p = pyramid(levels=3)
    assert all(a is b for a, b in zip(resize_levels(p, (4, 8, 16)), p, strict=True))


@pytest.mark.parametrize(("strides", "level"), [((3, 8), 0), ((8, 64), 1), ((16, 8), 0)])
def test_an_impossible_stride_is_named(strides: tuple[int, int], level: int) -> None:
    with pytest.raises(ValueError, match=rf"level {level} .*stride {strides[level]}"):
        resize_levels(pyramid(levels=2), strides)


def test_initial_probabilities() -> None:
    assert prior_bias(0.01) == pytest.approx(-4.59512, abs=1e-5)
    head = SoloHead(replace(SMALL, mask_prior=0.1), 6, 3)
    assert head.category_out.bias is not None
    assert head.category_out.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)
    assert head.mask_out[0].bias.sigmoid().mean().item() == pytest.approx(0.1)  # type: ignore[operator]


def test_coordinates_run_from_minus_one_to_one() -> None:
    x, y = coordinate_channels(torch.zeros(2, 5, 3, 5))
    assert x.shape == y.shape == (2, 1, 3, 5)
    assert x[0, 0, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert y[1, 0, :, 4].tolist() == [-1, 0, 1]


def test_a_side_of_one_pixel_has_coordinate_minus_one() -> None:
    x, y = coordinate_channels(torch.zeros(1, 5, 1, 1))
    assert x.item() == y.item() == -1


def test_octaves_append_sines_and_cosines() -> None:
    x, _ = coordinate_channels(torch.zeros(1, 1, 2, 9), octaves=2)
    plain = x[0, 0, 0]
    expected = [plain]
    for k in range(2):
        expected += [torch.sin(torch.pi * 2**k * plain), torch.cos(torch.pi * 2**k * plain)]
    assert x.shape == (1, 5, 2, 9)
    torch.testing.assert_close(x[0, :, 0], torch.stack(expected))


@pytest.mark.parametrize(
    ("kind", "towers"),
    [
        ("vanilla", {"category_convs", "mask_convs"}),
        ("decoupled", {"category_convs", "mask_convs_x", "mask_convs_y"}),
        ("decoupled_light", {"category_convs", "mask_convs"}),
    ],
)
def test_the_last_convolution_of_every_tower_is_deformable(kind: Any, towers: set[str]) -> None:
    torch.manual_seed(0)
    config = replace(SMALL, kind=kind, deformable=True)
    head, plain = SoloHead(config, 6, 3), SoloHead(replace(config, deformable=False), 6, 3)
    names = {name for name, m in head.named_modules() if isinstance(m, DeformConv2d)}
    assert names == {f"{tower}.1.conv" for tower in towers}
    state = head.state_dict()
    offsets = {key for key in state if key not in plain.state_dict()}
    assert offsets == {
        f"{name}.conv_offset.{part}" for name in names for part in ("weight", "bias")
    }
    assert all(not state[key].any() for key in offsets), "new offsets are zero"
    plain.load_state_dict({key: value for key, value in state.items() if key not in offsets})
    for found, expected in zip(head(pyramid()), plain(pyramid()), strict=True):
        torch.testing.assert_close(found.category_logits, expected.category_logits)
        torch.testing.assert_close(found.mask_inputs, expected.mask_inputs)


ODD_SIZES = pytest.mark.parametrize(
    ("height", "width", "grid"), [(16, 24, 8), (13, 17, 5), (3, 2, 7), (1, 9, 4), (12, 12, 12)]
)


@ODD_SIZES
def test_adaptive_max_pool_and_its_gradient(height: int, width: int, grid: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, height, width, requires_grad=True)
    weights = torch.randn(2, 3, grid, grid)
    found = align_to_grid(x, grid, "adaptive_max_pool")
    expected = F.adaptive_max_pool2d(x, grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (ours,) = torch.autograd.grad((found * weights).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def bilinear_sample(x: Tensor, y: float, column: float) -> Tensor:
    """[c, h, w] at a position in pixel centres; beyond the outermost centres the border's value."""
    _, height, width = x.shape
    y, column = min(max(y, 0.0), height - 1.0), min(max(column, 0.0), width - 1.0)
    top, left = int(y), int(column)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    u, v = y - top, column - left
    upper = x[:, top, left] * (1 - v) + x[:, top, right] * v
    lower = x[:, bottom, left] * (1 - v) + x[:, bottom, right] * v
    return upper * (1 - u) + lower * u


@ODD_SIZES
def test_region_grid_is_the_mean_of_samples_spread_over_each_cell(
    height: int, width: int, grid: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    found = align_to_grid(x, grid, "region_grid")
    parts = [(k + 0.5) / REGION_SAMPLES for k in range(REGION_SAMPLES)]
    for image in range(2):
        for i in range(grid):
            for j in range(grid):
                samples = [
                    bilinear_sample(
                        x[image], (i + a) * height / grid - 0.5, (j + b) * width / grid - 0.5
                    )
                    for a in parts
                    for b in parts
                ]
                torch.testing.assert_close(
                    found[image, :, i, j], torch.stack(samples).mean(0), rtol=0, atol=1e-6
                )


@ODD_SIZES
def test_interpolation_samples_the_middle_of_each_cell(height: int, width: int, grid: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    found = align_to_grid(x, grid, "interpolate")
    for i in range(grid):
        for j in range(grid):
            sample = bilinear_sample(
                x[0], (i + 0.5) * height / grid - 0.5, (j + 0.5) * width / grid - 0.5
            )
            torch.testing.assert_close(found[0, :, i, j], sample, rtol=0, atol=1e-6)


def test_the_alignment_changes_the_category_branch_alone() -> None:
    outputs = {
        align: build(align=align)(pyramid())[0]
        for align in ("interpolate", "adaptive_max_pool", "region_grid")
    }
    plain = outputs.pop("interpolate")
    for other in outputs.values():
        assert other.category_logits.shape == plain.category_logits.shape
        assert not torch.allclose(other.category_logits, plain.category_logits, atol=1e-3)
        torch.testing.assert_close(other.mask_inputs, plain.mask_inputs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_neck_that_begins_at_stride_8(kind: HeadKind) -> None:
    config = replace(
        SMALL,
        kind=kind,
        num_grids=(5,),
        level_strides=(8,),
        mask_strides=(4,),
        scale_ranges=((1, 2048),),
    )
    features = [pyramid()[1]]
    assert resize_levels(features, (8,), 8)[0] is features[0]
    (output,) = SoloHead(config, 6, 3, first_stride=8)(features)
    assert output.category_logits.shape == (2, 3, 5, 5)
    assert all(mask.shape[-2:] == (16, 24) for mask in output.mask_inputs)
    (halved,) = SoloHead(config, 6, 3)(features)  # the same features taken for stride 4
    assert all(mask.shape[-2:] == (8, 12) for mask in halved.mask_inputs)


def test_a_stride_below_the_necks_first_is_named() -> None:
    with pytest.raises(ValueError, match=r"level 0 of stride 8 .*stride 4"):
        resize_levels([pyramid()[1]], (4,), 8)
