"""Optimizers against plain loops, steps that must change nothing, and the learning-rate schedule."""

import copy
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.engine.optim import LARS, MOMENTUM, TRUST, learning_rate, make_optimizer, take_step
from fasttrain.system.errors import UserError

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)).double()


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def lars_by_loop(
    weights: list[torch.Tensor], gradients: list[torch.Tensor], velocities: list[torch.Tensor], lr: float, decay: float
) -> None:
    """You et al., algorithm 1, one parameter after the other, as MoCo v3 applies it."""
    for w, g, v in zip(weights, gradients, velocities, strict=True):
        if w.dim() > 1:
            g = g + decay * w
            if w.norm() > 0 and g.norm() > 0:
                g = g * (TRUST * w.norm() / g.norm())
        v.mul_(MOMENTUM).add_(g)
        w.sub_(lr * v)


def test_lars_is_the_papers() -> None:
    module = network()
    with torch.no_grad():
        module[4].weight.zero_()  # a norm of 0: not scaled
    optimizer = make_optimizer("lars", module, lr=0.5, weight_decay=0.1)
    assert isinstance(optimizer, LARS)
    weights = [p.detach().clone() for p in module.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    for step in range(4):
        give_gradients(module, step)
        lars_by_loop(weights, [p.grad.clone() for p in module.parameters()], velocities, 0.5, 0.1)
        take_step(optimizer, GOOD)
        for p, w in zip(module.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "shrinks"), [("sgd", True), ("lars", False), ("adamw", False)])
def test_weight_decay_of_vectors(name: str, shrinks: bool) -> None:
    """Without a gradient, a weight moves by its decay alone; vectors have one in SGD only."""
    module = network()
    before = copy.deepcopy(module)
    optimizer = make_optimizer(name, module, lr=0.1, weight_decay=0.5)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    take_step(optimizer, GOOD)
    for p, was in zip(module.parameters(), before.parameters(), strict=True):
        if p.dim() > 1:
            assert p.norm() < was.norm()
        elif was.norm() > 0:
            assert (p.norm() < was.norm()) == shrinks


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("good_before", [0, 2])
def test_a_bad_step_changes_nothing_and_leaves_no_trace(name: str, good_before: int) -> None:
    """Also when it is the first: torch's fused SGD would take up uninitialised momentum there."""
    module, other = network(), network()
    optimizer, untouched = (make_optimizer(name, m, lr=0.1, weight_decay=0.1) for m in (module, other))
    for step in range(good_before):
        for m, o in ((module, optimizer), (other, untouched)):
            give_gradients(m, step)
            take_step(o, GOOD)
    for p in module.parameters():
        p.grad = torch.full_like(p, float("nan"))
    take_step(optimizer, BAD)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for m, o in ((module, optimizer), (other, untouched)):
        give_gradients(m, 9)
        take_step(o, GOOD)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> type[torch.optim.SGD]:
    """A stand-in for NVIDIA's package: its LAMB here is an SGD that does not know of bad steps."""

    class FusedLAMB(torch.optim.SGD):
        def __init__(self, groups: list[dict[str, Any]], lr: float, max_grad_norm: float) -> None:
            assert max_grad_norm == float("inf")
            super().__init__(groups, lr=lr)

        def zero_grad(self) -> None:  # theirs takes no option
            super().zero_grad()

    module = types.ModuleType("apex.optimizers")
    module.FusedLAMB = FusedLAMB
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    return FusedLAMB


def test_lamb_is_apex_s(apex: type[torch.optim.SGD]) -> None:
    module = network()
    before = copy.deepcopy(module)
    optimizer = make_optimizer("lamb", module, lr=0.1, weight_decay=0.1)
    assert type(optimizer) is apex
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    give_gradients(module, 0)
    take_step(optimizer, BAD)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True))
    take_step(optimizer, GOOD)
    assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True))


def test_lamb_without_apex_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"needs NVIDIA's apex.*github.com/NVIDIA/apex"):
        make_optimizer("lamb", network(), 0.1, 0.1)


def test_cosine_from_peak_to_zero() -> None:
    assert learning_rate(0, 100, 0, 0.5) == 0.5
    assert learning_rate(50, 100, 0, 0.5) == pytest.approx(0.25)
    assert learning_rate(100, 100, 0, 0.5) == pytest.approx(0)
    assert learning_rate(101, 100, 0, 0.5) == pytest.approx(0)


def test_warm_up_is_linear_and_meets_the_cosine_at_its_peak() -> None:
    assert [learning_rate(step, 100, 4, 1.0) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
