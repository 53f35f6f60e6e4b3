"""Convolutions on a CPU in bf16 whose weight gradient is a matrix product where outputs are small.

oneDNN takes 1.3 to 11 times as long as the product for the weight gradient of outputs of up to 4×4 pixels (measured:
docs/log.md), which is what the deeper half of an encoder makes of a view of 32 px.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from fasttrain.kernels.autograd import Context

LARGEST_AREA = 16  # of an output, in pixels; above, oneDNN is as fast or faster


def convert_convolutions(module: nn.Module) -> None:
    """Have every ordinary convolution of a module compute as said above, in place; others stay as they are."""
    for child in module.modules():
        ordinary = type(child) is nn.Conv2d and child.groups == 1 and child.dilation == (1, 1)
        if ordinary and child.padding_mode == "zeros" and not isinstance(child.padding, str):
            child.__class__ = _Conv2d


class _Conv2d(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding = self.stride[0], int(self.padding[0])
        height, width = ((x.shape[i] + 2 * padding - weight.shape[i]) // stride + 1 for i in (2, 3))
        square = self.stride == (stride, stride) and self.padding == (padding, padding)
        bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if not (square and bf16 and torch.is_grad_enabled() and height * width <= LARGEST_AREA):
            return super()._conv_forward(x, weight, bias)
        out = _Convolution.apply(x.bfloat16(), weight.bfloat16(), stride, padding)
        return out if bias is None else out + bias.bfloat16()[:, None, None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(x.shape, weight, grad, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(x, grad, weight.shape[2:], ctx.stride, ctx.padding)
        return grad_x, grad_weight, None, None


def weight_gradient(x: Tensor, grad: Tensor, kernel: torch.Size, stride: int, padding: int) -> Tensor:
    """The gradient of a convolution's weight (out, in, *kernel): outputs' gradients times the patches under them.

    x: (N, in, H, W), grad: (N, out, H', W') of the output; channels-last, as is the result.
    """
    n, channels, _, _ = x.shape
    _, out, height, width = grad.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    image, row, column, channel = padded.stride()
    patches = padded.as_strided(
        (n, height, width, *kernel, channels), (image, row * stride, column * stride, row, column, channel)
    )
    rows = grad.permute(0, 2, 3, 1).reshape(-1, out)
    product = rows.T @ patches.reshape(len(rows), -1)
    return product.view(out, *kernel, channels).permute(0, 3, 1, 2)
