"""Convolutions on a CPU in bf16: their weight gradient is a matrix product where outputs are small, and right where
oneDNN's is not.

oneDNN takes 1.3 to 11 times as long as the product for the weight gradient of outputs of up to 4×4 pixels (measured:
docs/log.md), which is what the deeper half of an encoder makes of a view of 32 px. And it leaves the gradient of a
kernel's taps that meet nothing but padding as the memory was (torch 2.14.1; not in fp32 or fp16).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from fasttrain.kernels.autograd import Context

LARGEST_AREA = 16  # of an output, in pixels; above, oneDNN is as fast or faster


def convert_convolutions(module: nn.Module) -> None:
    """Have every convolution of torch's own in a module compute as said above, in place; others stay as they are."""
    for child in module.modules():
        if type(child) is nn.Conv2d and child.padding_mode == "zeros":
            child.__class__ = _Conv2d


class _Conv2d(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if not (bf16 and torch.is_grad_enabled()):
            return super()._conv_forward(x, weight, bias)
        stride, pads = self.stride[0], self._reversed_padding_repeated_twice
        height, width = ((x.shape[i] + 2 * pads[0] - weight.shape[i]) // stride + 1 for i in (2, 3))
        square = self.stride == (stride, stride) and len(set(pads)) == 1
        ordinary = square and self.groups == 1 and self.dilation == (1, 1)
        if ordinary and height * width <= LARGEST_AREA:
            out = _Convolution.apply(x.bfloat16(), weight.bfloat16(), stride, pads[0])
            return out if bias is None else out + bias.bfloat16()[:, None, None]
        if self._may_miss(x):  # with zeros of its own around the image, no tap is left out
            return F.conv2d(F.pad(x, pads), weight, bias, self.stride, 0, self.dilation, self.groups)
        return super()._conv_forward(x, weight, bias)

    def _may_miss(self, x: Tensor) -> bool:
        """Whether no place of the kernel lies wholly inside the image, so that taps may meet nothing but padding."""
        before = self._reversed_padding_repeated_twice[2::-2]
        reach = (dilation * (taps - 1) + 1 for dilation, taps in zip(self.dilation, self.kernel_size, strict=True))
        inside = (-pad % stride + side for pad, stride, side in zip(before, self.stride, reach, strict=True))
        return any(x.shape[2 + axis] < side for axis, side in enumerate(inside))


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
