"""Split batch norm: each group by its own statistics in training, running ones in evaluation."""

import ctypes
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.networks.batch_norm import convert_batch_norm


def layers(groups: int = 2) -> tuple[nn.BatchNorm2d, Any]:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3)
    nn.init.uniform_(plain.weight), nn.init.normal_(plain.bias)
    split = convert_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), "split", groups)
    split[0].load_state_dict(plain.state_dict())
    return plain, split[0]


def test_each_group_is_normalised_by_itself() -> None:
    plain, split = layers()
    x = torch.randn(64, 3, 5, 5) * torch.linspace(1, 9, 64).view(-1, 1, 1, 1)
    out = split(x)
    expected = torch.cat([plain(x[:32]), plain(x[32:])])
    assert torch.allclose(out, expected, atol=1e-6)
    assert not torch.allclose(out, plain(x), atol=1e-2)


def test_one_group_is_plain_batch_norm_with_its_running_statistics() -> None:
    plain, split = layers(groups=1)
    x = torch.randn(32, 3, 4, 4) * 3 + 1
    assert torch.equal(split(x), plain(x))
    assert torch.allclose(split.running_mean, plain.running_mean)
    assert torch.allclose(split.running_var, plain.running_var)
    split.eval(), plain.eval()
    assert torch.equal(split(x), plain(x))


class MoCoSplitBatchNorm(nn.BatchNorm2d):
    """That of MoCo's CIFAR-10 notebook, in training: every group is a set of channels of its own.

    Its groups are every `splits`-th image, so it is given them so.
    """

    splits = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        interleaved = x.unflatten(0, (self.splits, -1)).transpose(0, 1).reshape(n, c, h, w)
        mean, var = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)
        out = nn.functional.batch_norm(
            interleaved.view(-1, c * self.splits, h, w), mean, var, self.weight.repeat(self.splits),
            self.bias.repeat(self.splits), True, self.momentum, self.eps,
        ).view(-1, self.splits, c, h, w)  # fmt: skip
        self.running_mean.copy_(mean.view(self.splits, c).mean(0))
        self.running_var.copy_(var.view(self.splits, c).mean(0))
        return out.transpose(0, 1).reshape(n, c, h, w)


@pytest.mark.parametrize("images", [64, 16])
def test_a_step_s_values_and_running_statistics_are_those_of_moco_s_own(images: int) -> None:
    _, split = layers(groups=images // 4)
    recipe = MoCoSplitBatchNorm(3)
    recipe.splits = images // 4
    recipe.load_state_dict(split.state_dict())
    for step in range(20):
        x = torch.randn(images, 3, 2, 2) * torch.linspace(1, 9, images).view(-1, 1, 1, 1) + step
        assert torch.allclose(split(x), recipe(x), atol=1e-5)
        assert torch.allclose(split.running_mean, recipe.running_mean, rtol=1e-5)
        assert torch.allclose(split.running_var, recipe.running_var, rtol=1e-5)


def test_running_statistics_approach_those_of_the_data() -> None:
    _, split = layers(groups=3)
    for _ in range(200):
        split(torch.randn(96, 3, 4, 4) * 2 + 5)
    assert torch.allclose(split.running_mean, torch.full((3,), 5.0), atol=0.1)
    assert torch.allclose(split.running_var, torch.full((3,), 4.0), atol=0.3)


def test_conversion_keeps_names_and_layout() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    names = set(network.state_dict())
    convert_batch_norm(network, "split")
    assert set(network.state_dict()) == names
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    x = torch.randn(72, 3, 6, 6).to(memory_format=torch.channels_last)
    assert network(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_groups_in_place_are_the_groups_one_by_one(groups: int, precision: torch.dtype) -> None:
    plain, split = layers(groups)
    x = torch.randn(64, 3, 5, 5).to(precision, memory_format=torch.channels_last)
    values = []
    for forward in (split, lambda x: torch.cat([plain(group) for group in x.chunk(groups)])):
        x = x.detach().requires_grad_()
        out = forward(x)
        layer = split if forward is split else plain
        loss = (out.float().square() * torch.linspace(0, 1, 64).view(-1, 1, 1, 1)).sum()
        values.append((out, *torch.autograd.grad(loss, (x, layer.weight, layer.bias))))
    for ours, expected in zip(*values, strict=True):
        assert ours.dtype == expected.dtype
        assert torch.allclose(ours, expected, atol=1e-4)


def test_images_that_make_no_equal_groups_are_refused() -> None:
    """A group of one image, normalised by itself, would be worse than an error."""
    _, split = layers(groups=8)
    with pytest.raises(ValueError, match="31 images can't be cut into equal groups"):
        split(torch.randn(31, 3, 4, 4))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What malloc gives is filled with bytes that make enormous numbers, and torch has one thread."""
    threads, mallopt, perturb = torch.get_num_threads(), ctypes.CDLL(None).mallopt, -6  # M_PERTURB of malloc.h
    torch.set_num_threads(1)
    mallopt(perturb, 1)
    yield
    mallopt(perturb, 0)
    torch.set_num_threads(threads)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_a_compiled_network_computes_the_same(poisoned: None, precision: torch.dtype) -> None:
    """In one graph. Running statistics also where a variance is beyond fp16's range: autocast must not touch them."""
    torch.manual_seed(0)
    values = []
    weights = torch.randn(96, 4, 4, 4)
    x = 600 * torch.randn(96, 3, 6, 6).to(memory_format=torch.channels_last)
    for compiled in (False, True):
        torch.manual_seed(1)
        network = convert_batch_norm(
            nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), "split", 3
        )
        if compiled:
            network.compile(dynamic=False, fullgraph=True)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = network(x)
        (out.float() * weights).sum().backward()
        values.append((out, *(p.grad for p in network.parameters()), network[1].running_mean, network[1].running_var))
    tolerance = 1e-4 if precision == torch.float32 else 2e-2
    for ours, expected in zip(*(value[:-2] for value in values), strict=True):
        assert (ours - expected).float().norm() <= tolerance * expected.float().norm()
    for ours, expected in zip(*(value[-2:] for value in values), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4)
        assert expected.isfinite().all()
