"""Deformable convolution against a loop over its definition, and against the plain one."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch.nn import functional as F

from tests.support.tiny import TINY, disc
from training.configs.schema import BackboneConfig
from training.model.deform import DeformConv2d, deform_conv2d, output_side, reset_offsets
from training.model.solo import Solo
from training.objective import Objective, Precision
from training.targets import LevelTargets, Objects, assign_targets

Geometry = tuple[int, int, int]  # stride, padding, dilation
GEOMETRIES = [(1, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 2), (2, 3, 1), (3, 2, 2)]


def inputs(
    geometry: Geometry,
    *,
    kernel: int = 3,
    hw: tuple[int, int] = (4, 6),
    spread: float = 3.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two images of three channels; at a spread of 3 px many positions lie outside of them."""
    generator = torch.Generator().manual_seed(3)
    sides = [output_side(side, kernel, *geometry) for side in hw]
    shapes = ((2, 3, *hw), (2, 2 * kernel**2, *sides), (4, 3, kernel, kernel))
    x, offset, weight = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return x, offset * spread, weight


def bilinear(image: Tensor, y: float, x: float) -> Tensor:
    """Equation 3: the sum over pixels q of max(0, 1 - |q_y - y|) max(0, 1 - |q_x - x|) image(q)."""
    total = torch.zeros(image.shape[0], dtype=image.dtype)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            near = max(0.0, 1 - abs(row - y)) * max(0.0, 1 - abs(column - x))
            if near > 0:
                total += near * image[:, row, column]
    return total


def brute_force(x: Tensor, offset: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation = geometry
    kernel = weight.shape[-1]
    out = torch.zeros(x.shape[0], weight.shape[0], *offset.shape[2:], dtype=x.dtype)
    for b, i, j in np.ndindex(x.shape[0], *offset.shape[2:]):
        for row, column in np.ndindex(kernel, kernel):
            first = 2 * (row * kernel + column)
            dy, dx = offset[b, first : first + 2, i, j].tolist()
            y = i * stride - padding + row * dilation + dy
            x_ = j * stride - padding + column * dilation + dx
            out[b, :, i, j] += weight[:, :, row, column] @ bilinear(x[b], y, x_)
    return out


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_the_loop_over_its_definition(geometry: Geometry) -> None:
    x, offset, weight = inputs(geometry)
    found = deform_conv2d(x, offset, weight, *geometry)
    torch.testing.assert_close(found, brute_force(x, offset, weight, geometry), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel", "hw"), [(1, (4, 5)), (2, (5, 4)), (5, (6, 6)), (3, (1, 1))])
def test_other_kernels_and_sizes(kernel: int, hw: tuple[int, int]) -> None:
    geometry = (1, kernel // 2, 1)
    x, offset, weight = inputs(geometry, kernel=kernel, hw=hw)
    found = deform_conv2d(x, offset, weight, *geometry)
    torch.testing.assert_close(found, brute_force(x, offset, weight, geometry), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_without_offsets_it_is_a_convolution(geometry: Geometry, dtype: torch.dtype) -> None:
    x, offset, weight = inputs(geometry, spread=0, dtype=dtype)
    stride, padding, dilation = geometry
    plain = F.conv2d(x, weight, None, stride, padding, dilation)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    found = deform_conv2d(x, offset, weight, *geometry)
    torch.testing.assert_close(found, plain, rtol=0, atol=tolerance)


def test_whole_offsets_shift_the_input() -> None:
    x, offset, weight = inputs((1, 0, 1))
    offset[:, 0::2], offset[:, 1::2] = 2.0, -1.0  # two pixels down, one to the left
    shifted = F.pad(x, (1, 0, 0, 2))[:, :, 2:, :-1]
    found = deform_conv2d(x, offset, weight, 1, 0, 1)
    torch.testing.assert_close(found, F.conv2d(shifted, weight), rtol=0, atol=1e-12)


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, offset, weight = inputs((1, 1, 1))
    both = deform_conv2d(x, offset, weight, 1, 1, 1)
    alone = deform_conv2d(x[1:], offset[1:], weight, 1, 1, 1)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("far", [1e3, 1e9, 1e30, float("inf")])
@pytest.mark.parametrize("sign", [-1, 1])
def test_far_outside_there_is_nothing(far: float, sign: int) -> None:
    x, offset, weight = inputs((1, 1, 1), dtype=torch.float32)
    offset = torch.full_like(offset, sign * far).requires_grad_()
    out = deform_conv2d(x, offset, weight, 1, 1, 1)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(offset.grad, torch.zeros_like(offset))  # type: ignore[arg-type]


def test_what_is_not_a_number_stays_one() -> None:
    x, offset, weight = inputs((1, 1, 1))
    offset[0, 0, 2, 2] = float("nan")
    found = deform_conv2d(x, offset, weight, 1, 1, 1)
    assert found[0, :, 2, 2].isnan().all()
    assert found.isnan().sum() == weight.shape[0]


@pytest.mark.parametrize("geometry", [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_gradients(geometry: Geometry) -> None:
    x, offset, weight = inputs(geometry, hw=(4, 5), spread=1.5)
    leaves = tuple(t.requires_grad_() for t in (x, offset, weight))
    assert torch.autograd.gradcheck(lambda *t: deform_conv2d(*t, *geometry), leaves, fast_mode=True)


def test_every_single_gradient() -> None:
    leaves = tuple(t.requires_grad_() for t in inputs((1, 0, 1), kernel=2, hw=(2, 3)))
    assert torch.autograd.gradcheck(lambda *t: deform_conv2d(*t, 1, 0, 1), leaves)


def test_gradients_of_a_second_order_are_refused() -> None:
    x, offset, weight = inputs((1, 1, 1))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(
        deform_conv2d(x, offset, weight, 1, 1, 1).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()  # type: ignore[no-untyped-call]


def test_memory_format_does_not_matter() -> None:
    x, offset, weight = inputs((1, 1, 1))
    expected = deform_conv2d(x, offset, weight, 1, 1, 1)
    nhwc = [t.to(memory_format=torch.channels_last) for t in (x, offset, weight)]
    assert torch.equal(deform_conv2d(*nhwc, 1, 1, 1), expected)


@pytest.mark.slow
def test_the_operator_keeps_pytorchs_rules() -> None:
    """Schema, shapes without data, autograd and tracing with symbolic shapes agree."""
    leaves = tuple(t.requires_grad_() for t in inputs((2, 1, 1), dtype=torch.float32))
    torch.library.opcheck(deform_conv2d, (*leaves, 2, 1, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_gpu_gives_the_same_result_and_gradients(geometry: Geometry) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in inputs(geometry)]
        out = deform_conv2d(*leaves, *geometry)
        found[device] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    for ours, expected in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-10)


def test_half_precision_reads_at_exact_places() -> None:
    """In bfloat16 alone, pixel 301 would be 300."""
    x = torch.zeros(1, 1, 1, 400)
    x[..., 301] = 1
    offset = torch.zeros(1, 2, 1, 400)
    weight = torch.ones(1, 1, 1, 1)
    low = torch.bfloat16
    found = deform_conv2d(x.to(low), offset.to(low), weight.to(low), 1, 0, 1)
    assert found.dtype == low
    assert torch.equal(found.float(), x)


def test_autocast_comes_close_and_trains() -> None:
    torch.manual_seed(0)
    conv = DeformConv2d(8, 6, 3, padding=1)
    torch.nn.init.normal_(conv.conv_offset.weight, std=0.1)
    x = torch.randn(2, 8, 7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv(x)
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), conv(x), rtol=0, atol=0.03)
    for name, parameter in conv.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 18, 4, 5), r"offset is \[2, 18, 4, 5\], expected \[2, 18, 4, 6\]"),
        ((2, 27, 4, 6), r"offset is \[2, 27, 4, 6\], expected \[2, 18, 4, 6\]"),
        ((1, 18, 4, 6), r"offset is \[1, 18, 4, 6\], expected \[2, 18, 4, 6\]"),
    ],
)
def test_offsets_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    x, _, weight = inputs((1, 1, 1))
    with pytest.raises(ValueError, match=message):
        deform_conv2d(x, torch.zeros(shape), weight, 1, 1, 1)


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 3, 3, 1), (4, 3, 3)])
def test_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    x, offset, _ = inputs((1, 1, 1))
    with pytest.raises(ValueError, match=r"weight is .* expected \[D, 3, k, k\]"):
        deform_conv2d(x, offset, torch.zeros(shape, dtype=x.dtype), 1, 1, 1)


@pytest.mark.parametrize("bias", [False, True])
def test_the_module_starts_as_a_convolution_with_the_published_names(bias: bool) -> None:
    torch.manual_seed(0)
    conv = DeformConv2d(3, 4, 3, stride=2, padding=1, bias=bias)
    names = {"weight", "conv_offset.weight", "conv_offset.bias"} | ({"bias"} if bias else set())
    assert set(conv.state_dict()) == names
    assert conv.conv_offset.weight.shape == (18, 3, 3, 3)
    x = torch.randn(2, 3, 7, 8)
    expected = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-5)


def test_offsets_are_reset_in_the_whole_network() -> None:
    network = torch.nn.Sequential(DeformConv2d(3, 4, 3), DeformConv2d(4, 3, 1))
    for parameter in network.parameters():
        torch.nn.init.ones_(parameter)
    reset_offsets(network)
    for name, parameter in network.named_parameters():
        assert (parameter == ("conv_offset" not in name)).all(), name


def one_disc(y: int, x: int, radius: int) -> list[LevelTargets]:
    box = np.array([[x - radius, y - radius, x + radius, y + radius]], np.float32)
    objects = Objects(disc(64, 64, y, x, radius)[None], box, np.array([1]))
    return assign_targets(objects, (64, 64), TINY.model.head, TINY.targets, 2)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_deformable_model_learns_its_offsets(precision: Precision) -> None:
    """From zero offsets, the start of every training: both they and the loss move at once."""
    torch.manual_seed(0)
    backbone = BackboneConfig(depth=50, base_width=4, norm="gn", deformable_stages=(2, 3, 4))
    head = replace(TINY.model.head, deformable=True)
    model = Solo(replace(TINY.model, backbone=backbone, head=head), TINY.num_classes).train()
    objective = Objective(model, TINY.loss, precision=precision)
    offsets = [p for n, p in model.named_parameters() if "conv_offset" in n]
    assert len(offsets) == 2 * (13 + 2) and not any(p.any() for p in offsets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    targets = [one_disc(20, 24, 7), one_disc(40, 34, 12)]
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = objective(images, torch.full((2, 2), 64), targets, 10.0)["total"]
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert all(p.grad is not None and p.grad.any() for p in offsets)
        optimizer.step()
        losses.append(loss.item())
    assert all(p.any() and p.isfinite().all() for p in offsets)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_onnxs_deform_conv(geometry: Geometry) -> None:
    """Against the reference implementation in the onnx package."""
    stride, padding, dilation = geometry
    x, offset, weight = inputs(geometry, hw=(5, 6), dtype=torch.float32)
    make = onnx.helper.make_tensor_value_info
    names = {"x": x, "weight": weight, "offset": offset}
    node = onnx.helper.make_node(
        "DeformConv",
        list(names),
        ["y"],
        strides=[stride] * 2,
        pads=[padding] * 4,
        dilations=[dilation] * 2,
        kernel_shape=[3, 3],
    )
    graph = onnx.helper.make_graph(
        [node],
        "deform",
        [make(name, onnx.TensorProto.FLOAT, t.shape) for name, t in names.items()],
        [make("y", onnx.TensorProto.FLOAT, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)])
    feed = {name: tensor.numpy() for name, tensor in names.items()}
    (expected,) = cast(list[NDArray[np.float32]], ReferenceEvaluator(model).run(None, feed))
    found = deform_conv2d(x, offset, weight, *geometry)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=2e-5)
