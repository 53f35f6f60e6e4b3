"""Split batch norm: each group by its own statistics in training, running ones in evaluation."""

import copy
import ctypes
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import nn

from fasttrain.engine.ranks import Ranks
from fasttrain.networks import batch_norm
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
@pytest.mark.parametrize(
    ("precision", "affine"), [(torch.float32, True), (torch.float16, True), (torch.float32, False)]
)
def test_a_compiled_network_computes_the_same(poisoned: None, precision: torch.dtype, affine: bool) -> None:
    """In one graph. Running statistics also where a variance is beyond fp16's range: autocast must not touch them."""
    torch.manual_seed(0)
    values = []
    weights = torch.randn(96, 4, 4, 4)
    x = 600 * torch.randn(96, 3, 6, 6).to(memory_format=torch.channels_last)
    for compiled in (False, True):
        torch.manual_seed(1)
        network = convert_batch_norm(
            nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=affine), nn.ReLU(inplace=True)),
            "split", 3,
        )  # fmt: skip
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


@pytest.mark.parametrize("fusible", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("rows", "groups"), [(2, 1), (8, 2), (15, 3)])
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 0.02)])
def test_few_rows_of_a_head_are_the_groups_one_by_one_with_and_without_affine_parameters(
    monkeypatch: pytest.MonkeyPatch, rows: int, groups: int, affine: bool, fusible: bool, precision: torch.dtype,
    tolerance: float,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: fusible)
    torch.manual_seed(0)
    module = nn.BatchNorm1d(5, affine=affine, dtype=torch.promote_types(precision, torch.float32))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    plain = nn.ModuleList(copy.deepcopy(module) for _ in range(groups))
    split: Any = convert_batch_norm(nn.Sequential(module), "split", 8)[0]
    x, weights = (torch.randn(rows, 5) * 3 + 1).to(precision).requires_grad_(), torch.randn(rows, 5)
    ours, expected = split(x), torch.cat([layer(part) for layer, part in zip(plain, x.chunk(groups), strict=True)])
    of_x, *of_ours = torch.autograd.grad((ours * weights).sum(), (x, *split.parameters()))
    of_x_expected, *of_each = torch.autograd.grad((expected * weights).sum(), (x, *plain.parameters()))
    pairs = [(ours, expected), (of_x, of_x_expected)]
    pairs += [(found, torch.stack(of_each[i::2]).sum(0)) for i, found in enumerate(of_ours)]
    for name in ("running_mean", "running_var"):
        pairs.append((getattr(split, name), torch.stack([getattr(layer, name) for layer in plain]).mean(0)))
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype
        assert (found - wanted).norm() <= tolerance * (1 + wanted.norm())
    statistics = {"running_mean": split.running_mean, "running_var": split.running_var}
    plain[0].load_state_dict(statistics, strict=False)
    assert torch.equal(split.eval()(x), plain.eval()[0](x))


def _without_affine_parameters(folder: pathlib.Path) -> None:
    ranks = Ranks("cpu")
    torch.manual_seed(0)
    x, weights = torch.randn(2, 4, 5, dtype=torch.float64) * 3 + 1
    network = convert_batch_norm(nn.Sequential(nn.BatchNorm1d(5, affine=False, dtype=torch.float64)), "sync")
    own, own_weights = (rows.chunk(ranks.world_size)[ranks.rank] for rows in (x, weights))
    own = own.clone().requires_grad_()
    out = network(own)
    (out * own_weights).sum().backward()
    found = out.detach(), own.grad, network[0].running_mean, network[0].running_var
    torch.save(found, folder / f"{ranks.world_size}-{ranks.rank}.pt")
    ranks.close()


def test_synchronised_statistics_without_affine_parameters_are_those_of_the_whole_batch(tmp_path: pathlib.Path) -> None:
    """Two rows, then one, of a head on each rank: batch norm by itself refuses one."""
    found = {}
    for count in (1, 2, 4):
        succeed(on_ranks(tmp_path, count, _without_affine_parameters, tmp_path))
        ranks = [torch.load(tmp_path / f"{count}-{rank}.pt") for rank in range(count)]
        out, grad, (mean, *_), (variance, *_) = zip(*ranks, strict=True)
        found[count] = torch.cat(out), torch.cat(grad), mean, variance
    for count in (2, 4):
        assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(found[count], found[1], strict=True))


@pytest.mark.parametrize("kind", ["split", "sync"])
def test_what_is_converted_stays_and_keeps_its_parameters(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A method is converted as a whole, after its encoder."""
    monkeypatch.setattr(batch_norm, "world_size", lambda: 2)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    method = nn.Sequential(encoder, nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)))
    parameters, plain = dict(method.named_parameters()), dict(method.named_modules())
    convert_batch_norm(encoder, kind)
    converted = encoder[1]
    convert_batch_norm(method, kind)
    convert_batch_norm(method, kind)
    assert method[0][1] is converted
    assert not any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in method.modules())
    assert dict(method.named_modules()).keys() == plain.keys()
    found = dict(method.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameter for name, parameter in parameters.items())
