"""Deformable convolution ("Deformable Convolutional Networks", arXiv 1703.06211, section 2.1).

Every tap of the kernel reads the input at its regular position plus an offset that a second
convolution predicts; values are interpolated bilinearly and are zero outside the input. Version 1,
as in the published SOLO models: one offset group, one convolution group, no modulation. It consists
of PyTorch operations, so it runs on every device, and is one operator, `solo::deform_conv2d`, so
that an exported graph can contain it.

Symbols: B batch, C input and D output channels, k kernel side, H W input, h w output,
N = B * h * w positions, each of which reads four corners.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def output_side(side: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Height or width of a convolution's output."""
    return (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@torch.library.custom_op("solo::deform_conv2d", mutates_args=())
def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    """Deformable convolution (equation 2), once differentiable in its three tensors.

    Computes one tap at a time and saves only its inputs for the backward pass. The additional
    memory is that of one tap, [N, C], instead of the unfolded input's [N, C * k * k].

    Args:
        x: [B, C, H, W].
        offset: [B, 2 * k * k, h, w], px of the input: (y, x) of every tap, taps row by row.
        weight: [D, C, k, k], dtype of `x`.
        stride: Stride along both axes, px.
        padding: Padding of every side, px.
        dilation: Distance of the taps, px.

    Returns:
        [B, D, h, w], dtype of `x`; positions and sums have at least float32 precision.

    Raises:
        ValueError: The shapes are inconsistent.
    """
    _check_shapes(x, offset, weight, stride, padding, dilation)
    batch, _, height, width = offset.shape
    pixels = _pixels(x)
    out = pixels.new_zeros(batch * height * width, weight.shape[0])
    for number, tap in _taps(x, offset, weight.shape[-1], stride, padding, dilation):
        taken = tap.sample(pixels).to(x.dtype)
        out += torch.matmul(taken, weight.flatten(2)[..., number].T)
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2).to(x.dtype).contiguous()


def _check_shapes(
    x: Tensor, offset: Tensor, weight: Tensor, stride: int, padding: int, dilation: int
) -> None:
    kernel = weight.shape[-1]
    if weight.ndim != 4 or weight.shape[2] != kernel or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight is {list(weight.shape)}, expected [D, {x.shape[1]}, k, k] for the input "
            f"{list(x.shape)}"
        )
    sides = [output_side(s, kernel, stride, padding, dilation) for s in x.shape[2:]]
    expected = [x.shape[0], 2 * kernel * kernel, *sides]
    if list(offset.shape) != expected:
        raise ValueError(f"offset is {list(offset.shape)}, expected {expected}")


def _pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B * H * W, C], at least float32: bfloat16 has only 8 bits of precision."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).to(_exact(x))


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class _Tap:
    """Positions that one tap of the kernel reads.

    Attributes:
        index: [N, 4] pixels of the corners: upper left, upper right, lower left, lower right.
        inside: [N, 4], 1, or 0 for a corner outside the input.
        down, right: [N] distance from the upper left corner, px.
    """

    index: Tensor
    inside: Tensor
    down: Tensor
    right: Tensor

    def weights(self) -> Tensor:
        """[N, 4] bilinear weights (equation 3)."""
        y, x = self.down, self.right
        corners = [(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x]
        return torch.stack(corners, 1) * self.inside

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Derivatives [N, 4] of the weights with respect to y and x of the position."""
        y, x = self.down, self.right
        by_y = torch.stack([x - 1, -x, 1 - x, x], 1)
        by_x = torch.stack([y - 1, 1 - y, -y, y], 1)
        return by_y * self.inside, by_x * self.inside

    def sample(self, pixels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Weighted sums [N, C] of the corners' rows of `pixels`; bilinear without `weights`."""
        weights = self.weights() if weights is None else weights
        return F.embedding_bag(self.index, pixels, per_sample_weights=weights, mode="sum")

    def spread(self, grad: Tensor, count: int) -> Tensor:
        """Transpose of `sample`, [N, C] -> [count, C]: sums at each pixel what reads it."""
        index, order = self.index.flatten().sort(stable=True)  # stable: sums are reproducible
        first = torch.searchsorted(index, torch.arange(count, device=index.device))
        weights = self.weights().flatten()[order]
        return F.embedding_bag(order // 4, grad, first, per_sample_weights=weights, mode="sum")


def _taps(
    x: Tensor, offset: Tensor, kernel: int, stride: int, padding: int, dilation: int
) -> Iterator[tuple[int, _Tap]]:
    """Yields the number and the positions of every tap."""
    batch, _, height, width = x.shape
    dtype, device = _exact(x), x.device
    offset = offset.to(dtype)
    rows = torch.arange(offset.shape[2], dtype=dtype, device=device)[:, None] * stride - padding
    columns = torch.arange(offset.shape[3], dtype=dtype, device=device) * stride - padding
    image = torch.arange(batch, device=device)[:, None, None] * (height * width)
    for number in range(kernel * kernel):
        y = rows + dilation * (number // kernel) + offset[:, 2 * number]
        x_ = columns + dilation * (number % kernel) + offset[:, 2 * number + 1]
        seen = (y > -1) & (y < height) & (x_ > -1) & (x_ < width)
        y, x_ = y.clamp(-1, height), x_.clamp(-1, width)
        top, left = y.floor(), x_.floor()
        index, inside = [], []
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row, column = top.long() + down, left.long() + right
            hit = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            index.append((image + pixel).flatten())
            inside.append((seen & hit).flatten())
        corners = torch.stack(index, 1), torch.stack(inside, 1).to(dtype)
        yield number, _Tap(*corners, (y - top).flatten(), (x_ - left).flatten())


@deform_conv2d.register_fake
def _fake(
    x: Tensor, offset: Tensor, weight: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    sides = [output_side(s, weight.shape[-1], stride, padding, dilation) for s in x.shape[2:]]
    return x.new_empty(x.shape[0], weight.shape[0], *sides)


@torch.library.custom_op("solo::deform_conv2d_backward", mutates_args=())
def _gradients(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `offset` and `weight`; samples each tap again instead of storing it."""
    batch, channels, height, width = x.shape
    pixels = _pixels(x)
    grad_rows = grad.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
    grad_pixels = torch.zeros_like(pixels)
    grad_offset, grad_weight = [], []
    for number, tap in _taps(x, offset, weight.shape[-1], stride, padding, dilation):
        grad_weight.append(torch.matmul(grad_rows.T, tap.sample(pixels).to(x.dtype)))
        grad_taken = torch.matmul(grad_rows, weight.flatten(2)[..., number]).to(pixels.dtype)
        grad_pixels += tap.spread(grad_taken, len(pixels))
        for slope in tap.slopes():
            grad_offset.append(torch.linalg.vecdot(grad_taken, tap.sample(pixels, slope)))
    by_tap = torch.stack(grad_offset).view(-1, batch, *offset.shape[2:])
    return (
        grad_pixels.view(batch, height, width, channels).permute(0, 3, 1, 2).to(x).contiguous(),
        by_tap.transpose(0, 1).to(offset).contiguous(),
        torch.stack(grad_weight, 2).view_as(weight).to(weight),
    )


@_gradients.register_fake
def _fake_gradients(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), offset.new_empty(offset.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.geometry = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(grad, *ctx.saved_tensors, *ctx.geometry), None, None, None)


deform_conv2d.register_autograd(_backward, setup_context=_save)


class DeformConv2d(nn.Conv2d):
    """Convolution whose taps are shifted by offsets that `conv_offset` predicts from the input.

    The offsets are initialised to zero, which makes it the regular convolution with its weights.
    The parameters have the names of the published checkpoints.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias
        )
        self.geometry = (stride, padding, dilation)
        self.conv_offset = nn.Conv2d(
            in_channels, 2 * kernel_size**2, kernel_size, stride, padding, dilation
        )
        reset_offsets(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, h, w]; under autocast only the offsets are float32."""
        device, weight = x.device.type, self.weight
        if torch.is_autocast_enabled(device):
            low = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                offset = self.conv_offset(x.float())
            x, weight = x.to(low), weight.to(low)
        else:
            offset = self.conv_offset(x)
        out: Tensor = deform_conv2d(x, offset, weight, *self.geometry)
        return out if self.bias is None else out + self.bias[:, None, None].to(out.dtype)


def reset_offsets(network: nn.Module) -> None:
    """Initialises every deformable convolution so that its offsets are zero for any input."""
    for module in network.modules():
        if isinstance(module, DeformConv2d):
            assert module.conv_offset.bias is not None
            nn.init.zeros_(module.conv_offset.weight)
            nn.init.zeros_(module.conv_offset.bias)
