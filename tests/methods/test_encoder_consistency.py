"""Cross-similarity consistency of what the encoder gives, with every method that takes it."""

import pathlib
from typing import Any

import pytest
import torch
from support.forks import on_ranks, succeed
from support.steps import build, sample, small
from torch import Tensor
from torch.nn import functional as F

from fasttrain.engine.ranks import Ranks
from fasttrain.losses import reference
from fasttrain.losses.batch import batch_consistency
from fasttrain.losses.options import Regularisers
from fasttrain.losses.regularisers import with_features
from fasttrain.methods import options
from fasttrain.system.options import flat

METHODS = [name for name, made in options.METHODS.items() if "cross_features" in flat(made())]
BOTH_WAYS = {"mocov3", "simclr", "nnclr", "byol", "simsiam", "mv-infonce", "mv-dhel", "cacr", "bacon"}  # always
ENCODER: dict[str, Any] = {"cross_features": "encoder", "cross_weight": 5.0, "uniform": "none"}


def test_these_methods_take_it() -> None:
    assert set(METHODS) == {"moco", "xmoco", "co2", "ressl", "sce", "cacr-queue", "hiclr", *BOTH_WAYS}


@pytest.mark.parametrize(
    ("method", "symmetric"), [*((name, False) for name in METHODS), ("moco", True), ("xmoco", True), ("sce", True)]
)
@pytest.mark.parametrize("cross", ["batch", "batch-within"])
def test_the_loss_has_the_consistency_of_the_views_features(method: str, symmetric: bool, cross: str) -> None:
    """In evaluation mode, where batch norm mixes nothing; momentum networks are copies still."""
    like: dict[str, Any] = {} if method in BOTH_WAYS else {"batch_norm": "split"}
    like |= {"symmetric": symmetric} if "symmetric" in flat(options.METHODS[method]()) else {}
    model = build(small(method, cross=cross, **ENCODER, **like)).eval()
    off = build(small(method, cross="none", uniform="none", **like)).eval()
    given = sample(8)
    features = [F.normalize(model.encoder(view), dim=1) for view in given.views[0]]
    if method == "hiclr":  # whose stronger views stand between these two
        given = given._replace(views=(given.views[0][[0, 0, 1, 1]],))
    out, plain = model(given), off(given)

    ways = [features, features[::-1]] if method in BOTH_WAYS or symmetric else [features]
    expected = torch.stack(
        [reference.batch_consistency(q, k.detach(), cross == "batch-within") for q, k in ways]
    ).mean()
    assert torch.allclose(out.terms["cross"], expected.detach(), rtol=1e-4)
    assert torch.allclose(out.loss, plain.loss + 5 * expected, rtol=1e-5)
    weight, other = model.encoder[1].conv1.weight, off.encoder[1].conv1.weight
    own, rest = (torch.autograd.grad(loss, x)[0] for loss, x in ((out.loss, weight), (plain.loss, other)))
    added = torch.autograd.grad(5 * expected, weight)[0]
    assert added.abs().max() > 1e-4
    assert torch.allclose(own - rest, added, atol=1e-2 * float(added.abs().max()) + 1e-6)
    for ours, theirs in zip(out.carry, plain.carry, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)  # keys are as wide as without


def test_keys_take_no_gradient_and_what_is_off_changes_nothing() -> None:
    q, k = torch.randn(2, 6, 9).requires_grad_().unbind()
    made = q.sum(), {"contrast": q.sum().detach()}
    for off in (Regularisers(), Regularisers(cross="batch"), Regularisers(cross_features="encoder")):
        assert with_features(made, off, [q], [k]) is made
    leaf_q, leaf_k = (x.detach().requires_grad_() for x in (q, k))
    twice = Regularisers(cross="batch-within", cross_features="encoder", cross_weight=2.0)
    loss, terms = with_features((torch.zeros(()), {}), twice, [leaf_q], [leaf_k])
    assert torch.allclose(loss, 2 * terms["cross"])
    loss.backward()
    assert leaf_k.grad is None
    assert leaf_q.grad is not None


def _share(folder: pathlib.Path, within: bool) -> None:
    """One rank's rows: the loss, and its gradient averaged over ranks, as DDP does."""
    ranks = Ranks("cpu")
    q_MD, k_MD = torch.load(folder / "inputs.pt")
    own = slice(ranks.rank * len(q_MD) // ranks.world_size, (ranks.rank + 1) * len(q_MD) // ranks.world_size)
    q_ND = q_MD[own].clone().requires_grad_()
    loss = batch_consistency(q_ND, k_MD[own], within)
    loss.backward()
    torch.save((loss.detach(), q_ND.grad / ranks.world_size), folder / f"rank{ranks.rank}.pt")
    ranks.close()


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(("rows", "width", "world_size"), [(12, 8, 4), (48, 8, 2)])  # by pairs; by sums
def test_pairs_of_all_ranks_count(tmp_path: pathlib.Path, within: bool, rows: int, width: int, world_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = F.normalize(torch.randn(2, rows, width, generator=generator, dtype=torch.float64), dim=2)
    torch.save((q, k), tmp_path / "inputs.pt")
    succeed(on_ranks(tmp_path, world_size, _share, tmp_path, within))
    whole = q.clone().requires_grad_()
    loss = reference.batch_consistency(whole, k, within)
    loss.backward()
    parts: list[tuple[Tensor, Tensor]] = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    assert all(torch.allclose(part, loss.detach()) for part, _ in parts)
    assert torch.allclose(torch.cat([gradient for _, gradient in parts]), whole.grad)
