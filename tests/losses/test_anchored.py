"""Margins beyond a frozen encoder: a slow loop, closed forms, one process against several."""

import math
import pathlib

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.losses.anchored import Margins, anchored_margins

IMPLS = ["reference", "auto"]


def rows(n: int, d: int, seed: int) -> Tensor:
    """Of two views of n images, of which those of one lie near each other."""
    generator = torch.Generator().manual_seed(seed)
    image_ND = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return F.normalize(image_ND + torch.randn(2, n, d, generator=generator, dtype=torch.float64) / 2, dim=2)


def turned(apart: list[float]) -> Tensor:
    """Two views of images on axes of their own, whose cosine with each other is given."""
    cosine_N1 = torch.tensor(apart, dtype=torch.float64)[:, None]
    first_ND, other_ND = torch.eye(2 * len(apart), dtype=torch.float64).chunk(2)
    return torch.stack([first_ND, cosine_N1 * first_ND + (1 - cosine_N1**2).sqrt() * other_ND])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("margin", [0.05, 0.2, 0.6])
def test_value_and_gradient(impl: str, margin: float) -> None:
    """Also where the anchor's rows are of another width."""
    z, anchor, n, split = rows(7, 8, 1).requires_grad_(), rows(7, 5, 2).requires_grad_(), 7, 0.3
    absolute, relative, met = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for (a, b), (t, u) in (((z[0], z[1]), anchor), ((z[1], z[0]), (anchor[1], anchor[0]))):
        for i in range(n):
            own, anchored = a[i] @ b[i], (t[i] @ u[i]).detach()
            others = [(a[i] @ b[j], (t[i] @ u[j]).detach()) for j in range(n) if j != i]
            absolute = absolute + F.relu(split * margin + anchored - own) / n
            absolute = absolute + max(F.relu((1 - split) * margin + s - its) for s, its in others) / n
            worst = max(F.relu(margin + (anchored - its) - (own - s)) for s, its in others)
            relative, met = relative + worst / n, met + (worst == 0) / (2 * n)
    ours = anchored_margins(z, anchor, margin, split, impl)
    for one, other in zip(ours, (absolute, relative, met), strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    assert not ours.met.requires_grad
    for one, other in ((ours.absolute, absolute), (ours.relative, relative)):
        found, expected = (torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (one, other))
        assert torch.allclose(found, expected, atol=1e-12)
        assert found.abs().max() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("split", [0.0, 0.3, 1.0])
def test_an_encoder_like_its_anchor_lacks_the_whole_margin(impl: str, split: float) -> None:
    found = anchored_margins(rows(6, 8, 1), rows(6, 8, 1), 0.2, split, impl)
    assert [float(value) for value in found] == pytest.approx([0.4, 0.4, 0], abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("gain", "absolute", "relative", "met"),
    [
        # the positives' half of the margin is 0.1, and the other images have come no nearer
        (0.04, 2 * 0.06 + 2 * 0.1, 2 * 0.16, 0),
        (0.1, 2 * 0.1, 2 * 0.1, 0),
        (0.15, 2 * 0.1, 2 * 0.05, 0),
        (0.3, 2 * 0.1, 0, 1),
    ],
)
def test_positives_that_gained(impl: str, gain: float, absolute: float, relative: float, met: float) -> None:
    anchor, z = turned([0.2, 0.5, 0.1]), turned([0.2 + gain, 0.5 + gain, 0.1 + gain])
    found = anchored_margins(z, anchor, 0.2, 0.5, impl)
    assert [float(value) for value in found] == pytest.approx([absolute, relative, met], abs=1e-12)


def test_of_a_single_image_only_the_positive_counts() -> None:
    z = turned([0.3]).requires_grad_()
    found = anchored_margins(z, turned([0.5]), 0.2, 0.5)
    assert [float(value.detach()) for value in found] == pytest.approx([2 * 0.3, 0, 1], abs=1e-12)
    assert torch.autograd.grad(found.absolute + found.relative, z)[0].isfinite().all()


def test_bad_numbers_do_not_come_out_plausible() -> None:
    for bad in (math.nan, math.inf):
        z = rows(6, 8, 1)
        z[1, 2, 3] = bad
        absolute, relative, _ = anchored_margins(z, rows(6, 8, 2), 0.2, 0.5)
        assert not absolute.isfinite()
        assert not relative.isfinite()


def _own_rows(folder: pathlib.Path) -> None:
    ranks = Ranks("cpu")
    whole = torch.load(folder / "inputs.pt")
    own = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    z, anchor = (x[:, own].clone().requires_grad_() for x in whole)
    found = _margins(z, anchor)
    (found.absolute + 3 * found.relative).backward()
    torch.save((tuple(map(Tensor.detach, found)), z.grad / ranks.world_size), folder / f"rank{ranks.rank}.pt")
    ranks.close()


def _margins(z: Tensor, anchor: Tensor) -> Margins:
    return anchored_margins(z, anchor, 0.2, 0.4)


def test_ranks_with_rows_of_their_own_have_the_gradient_of_one(tmp_path: pathlib.Path) -> None:
    """Of which the nearest other image may be another's."""
    z, anchor = rows(12, 8, 1).requires_grad_(), rows(12, 8, 2)
    torch.save((z.detach(), anchor), tmp_path / "inputs.pt")
    expected = _margins(z, anchor)
    (expected.absolute + 3 * expected.relative).backward()
    succeed(on_ranks(tmp_path, 3, _own_rows, tmp_path))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(3)]
    for values, whole in zip(zip(*(values for values, _ in found), strict=True), expected, strict=True):
        assert torch.allclose(torch.stack(values).mean(), whole.detach(), atol=1e-12)
    assert torch.allclose(torch.cat([gradient for _, gradient in found], 1), z.grad, atol=1e-12)
