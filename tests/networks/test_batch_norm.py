"""Split batch norm: each group by its own statistics in training, running ones in evaluation."""

import ctypes
import shutil

import pytest
import torch
from torch import nn

from fasttrain.networks.batch_norm import GROUP_SIZE, convert_batch_norm


def layers():
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3)
    nn.init.uniform_(plain.weight)
    split = convert_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), "split")
    split[0].load_state_dict(plain.state_dict())
    return plain, split[0]


def test_each_group_is_normalised_by_itself():
    plain, split = layers()
    x = torch.randn(2 * GROUP_SIZE, 3, 5, 5) * torch.linspace(1, 9, 2 * GROUP_SIZE).view(-1, 1, 1, 1)
    out = split(x)
    expected = torch.cat([plain(x[:GROUP_SIZE]), plain(x[GROUP_SIZE:])])
    assert torch.allclose(out, expected, atol=1e-6)
    assert not torch.allclose(out, plain(x), atol=1e-2)


def test_one_group_is_plain_batch_norm_with_its_running_statistics():
    plain, split = layers()
    x = torch.randn(GROUP_SIZE, 3, 4, 4) * 3 + 1
    assert torch.equal(split(x), plain(x))
    assert torch.allclose(split.running_mean, plain.running_mean)
    assert torch.allclose(split.running_var, plain.running_var)
    split.eval(), plain.eval()
    assert torch.equal(split(x), plain(x))


def test_running_statistics_approach_those_of_the_data():
    _, split = layers()
    for _ in range(200):
        split(torch.randn(3 * GROUP_SIZE + 7, 3, 4, 4) * 2 + 5)
    assert torch.allclose(split.running_mean, torch.full((3,), 5.0), atol=0.1)
    assert torch.allclose(split.running_var, torch.full((3,), 4.0), atol=0.3)


def test_conversion_keeps_names_and_layout():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    names = set(network.state_dict())
    convert_batch_norm(network, "split")
    assert set(network.state_dict()) == names
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    x = torch.randn(70, 3, 6, 6).to(memory_format=torch.channels_last)
    assert network(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [2 * GROUP_SIZE, 2 * GROUP_SIZE + 5])
def test_groups_in_place_are_the_groups_one_by_one(count):
    plain, split = layers()
    x = torch.randn(count, 3, 5, 5).to(memory_format=torch.channels_last)
    values = []
    for forward in (split, lambda x: torch.cat([plain(group) for group in x.tensor_split(2)])):
        x = x.detach().requires_grad_()
        out = forward(x)
        layer = split if forward is split else plain
        values.append((out, *torch.autograd.grad(out.square().sum() + out.sum(), (x, layer.weight, layer.bias))))
    for ours, expected in zip(*values, strict=True):
        assert torch.allclose(ours, expected, atol=1e-4)


@pytest.fixture
def poisoned():
    """What malloc gives is filled with bytes that make enormous numbers, and torch has one thread."""
    threads, mallopt, perturb = torch.get_num_threads(), ctypes.CDLL(None).mallopt, -6  # M_PERTURB of malloc.h
    torch.set_num_threads(1)
    mallopt(perturb, 1)
    yield
    mallopt(perturb, 0)
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
@pytest.mark.parametrize("more", [0, 5])  # rows that make equal groups, or not
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_a_compiled_network_computes_the_same(poisoned, more, precision):
    """Running statistics also where a variance is beyond fp16's range, as autocast must not touch them."""
    torch.manual_seed(0)
    values = []
    weights = torch.randn(3 * GROUP_SIZE + more, 4, 4, 4)
    x = 600 * torch.randn(3 * GROUP_SIZE + more, 3, 6, 6).to(memory_format=torch.channels_last)
    for compiled in (False, True):
        torch.manual_seed(1)
        network = convert_batch_norm(
            nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), "split"
        )
        if compiled:
            network.compile(dynamic=False)
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
