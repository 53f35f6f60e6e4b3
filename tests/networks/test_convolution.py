"""Convolutions whose weight gradient is a product: the same values, gradients and names as torch's own."""

import pytest
import torch
from torch import nn

from fasttrain.networks import convolution
from fasttrain.networks.convolution import convert_convolutions, weight_gradient

DTYPES = 4 * (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (1, 1, 0), (5, 2, 0)])
@pytest.mark.parametrize("side", [5, 6, 8])
def test_weight_gradient_in_fp64(kernel: int, stride: int, padding: int, side: int) -> None:
    x = torch.randn(3, 4, side, side + 1, dtype=torch.float64)
    weight = torch.randn(6, 4, kernel, kernel, dtype=torch.float64, requires_grad=True)
    out = nn.functional.conv2d(x, weight, None, stride, padding)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, weight, grad)[0]
    assert torch.allclose(weight_gradient(x, grad, weight.shape[2:], stride, padding), expected, atol=1e-12)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 1),
    )  # fmt: skip


def step(layers: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        out = layers(x)
    return out, *torch.autograd.grad(out.float().square().sum(), [x, *layers.parameters()])


def test_a_network_computes_the_same_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain, ours = network(), network()
    ours.load_state_dict(plain.state_dict())
    convert_convolutions(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    calls = []
    real = convolution.weight_gradient
    monkeypatch.setattr(convolution, "weight_gradient", lambda *a: calls.append(a) or real(*a))
    x = torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    expected, found = step(plain, x), step(ours, x)
    assert len(calls) == 3  # all outputs are 4×4 or less; the grouped one is torch's
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 0.02 * other.abs().max()


def test_large_outputs_and_other_precisions_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not for this one")

    monkeypatch.setattr(convolution, "weight_gradient", refuse)
    layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    convert_convolutions(layer)
    step(layer, torch.randn(2, 3, 5, 5, requires_grad=True))
    layer(torch.randn(2, 3, 4, 4)).sum().backward()
    with pytest.raises(AssertionError):
        step(layer, torch.randn(2, 3, 4, 4, requires_grad=True))


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        (nn.Conv2d(256, 256, 5, 2, 2, groups=8), 1),
        (nn.Conv2d(256, 256, 5, 2, 2, groups=256), 1),
        (nn.Conv2d(256, 256, (1, 7), 2, (0, 3)), 1),
        (nn.Conv2d(256, 256, 5, 1, "same", groups=8), 2),
        (nn.Conv2d(64, 64, 7, 4, 3, groups=2), 3),
        (nn.Conv2d(64, 64, 3, 3, 2, 2, groups=2), 2),
    ],
    ids=str,
)
def test_taps_that_meet_nothing_but_padding_have_no_gradient(layer: nn.Conv2d, side: int) -> None:
    """oneDNN leaves what was in the memory there."""
    convert_convolutions(layer)
    x = torch.randn(8, layer.in_channels, side, side).to(memory_format=torch.channels_last)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    for _ in range(10):
        left = [torch.full_like(layer.weight, float("nan"), dtype=dtype) for dtype in DTYPES]
        del left
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        found = torch.autograd.grad(out.float().square().sum(), layer.weight)[0]
        assert (found - expected).norm() <= 0.02 * expected.norm()
