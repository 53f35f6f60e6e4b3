"""Optimizers against plain loops, steps that must change nothing, and the learning-rate schedule."""

import copy
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.engine.optim import (
    LARS,
    MOMENTUM,
    Rates,
    Schedule,
    learning_rate,
    make_optimizer,
    set_rates,
    take_step,
)
from fasttrain.engine.options import OptimisationOptions
from fasttrain.system.errors import UserError

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def options(name: str, lr: float, weight_decay: float, **changes: Any) -> OptimisationOptions:
    """lr: the peak itself."""
    return OptimisationOptions(optimizer=name, batch_size=256, lr=lr, weight_decay=weight_decay, **changes)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)).double()


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def lars_by_loop(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    velocities: list[torch.Tensor],
    lr: float,
    decay: float,
    trust: float,
    clip: bool,
) -> None:
    """You et al., algorithm 1, one parameter after the other, as MoCo v3 applies it."""
    for w, g, v in zip(weights, gradients, velocities, strict=True):
        if w.dim() > 1:
            g = g + decay * w
            if w.norm() > 0 and g.norm() > 0:
                g = g * min(trust * w.norm() / g.norm() / (lr if clip else 1), 1 if clip else math.inf)
        v.mul_(MOMENTUM).add_(g)
        w.sub_(lr * v)


@pytest.mark.parametrize(("trust", "clip"), [(1e-3, False), (0.02, True), (5.0, True)])
def test_lars_is_the_papers(trust: float, clip: bool) -> None:
    module = network()
    with torch.no_grad():
        module[4].weight.zero_()  # a norm of 0: not scaled
    optimizer = make_optimizer(options("lars", 0.5, 0.1, trust=trust, trust_clip=clip), module)
    assert isinstance(optimizer, LARS)
    weights = [p.detach().clone() for p in module.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    for step in range(4):
        give_gradients(module, step)
        lars_by_loop(weights, [p.grad.clone() for p in module.parameters()], velocities, 0.5, 0.1, trust, clip)
        take_step(optimizer, GOOD)
        for p, w in zip(module.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "shrinks"), [("sgd", True), ("lars", False), ("adamw", False)])
def test_weight_decay_of_vectors(name: str, shrinks: bool) -> None:
    """Without a gradient, a weight moves by its decay alone; vectors have one in SGD only."""
    module = network()
    before = copy.deepcopy(module)
    optimizer = make_optimizer(options(name, 0.1, 0.5), module)
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
    optimizer, untouched = (make_optimizer(options(name, 0.1, 0.1), m) for m in (module, other))
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
    optimizer = make_optimizer(options("lamb", 0.1, 0.1), module)
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
        make_optimizer(options("lamb", 0.1, 0.1), network())


def test_cosine_from_peak_to_zero() -> None:
    assert learning_rate(0, 100, 0, 0.5) == 0.5
    assert learning_rate(50, 100, 0, 0.5) == pytest.approx(0.25)
    assert learning_rate(100, 100, 0, 0.5) == pytest.approx(0)
    assert learning_rate(101, 100, 0, 0.5) == pytest.approx(0)


def test_warm_up_is_linear_and_meets_the_cosine_at_its_peak() -> None:
    assert [learning_rate(step, 100, 4, 1.0) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_a_learning_rate_falls_to_a_part_of_its_peak() -> None:
    assert learning_rate(100, 100, 0, 2.0, 0.1) == pytest.approx(0.2)
    assert learning_rate(50, 100, 0, 2.0, 0.1) == pytest.approx(1.1)


def test_weight_decay_follows_a_cosine_where_it_has_an_end() -> None:
    schedule = Schedule(options("adamw", 0.1, 0.04, weight_decay_end=0.4, epochs=10, warmup_epochs=1), 10)
    assert [schedule(step).weight_decay for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert [schedule(step).steady_lr for step in (0, 9, 10, 99)] == pytest.approx([0.01, 0.1, 0.1, 0.1])
    assert schedule.total_steps == 100
    assert Schedule(options("sgd", 0.1, 0.3, epochs=10), 10)(77).weight_decay == pytest.approx(0.3)


def test_a_schedule_that_is_extended_begins_anew_and_what_was_before_stays_as_it_was() -> None:
    """4 epochs of 10 steps, then 2 whose warm-up fits, then 1 whose warm-up is shortened to a tenth."""
    asked = options("adamw", 0.1, 0.04, weight_decay_end=0.4, epochs=4, warmup_epochs=1.0, final_lr=0.01)
    plain, schedule = Schedule(asked, 10), Schedule(asked, 10, (2, 1))
    assert schedule.total_steps == 70
    assert [schedule(step) for step in range(40)] == [plain(step) for step in range(40)]
    two = Schedule(OptimisationOptions(**{**vars(asked), "epochs": 2}), 10)
    assert [schedule(step) for step in range(40, 60)] == [two(step) for step in range(20)]
    assert [schedule(step).lr for step in (39, 40, 49, 50)] == pytest.approx([0.00127, 0.01, 0.1, 0.1], rel=0.01)
    one = Schedule(OptimisationOptions(**{**vars(asked), "epochs": 1, "warmup_epochs": 0.1}), 10)
    assert [schedule(step) for step in range(60, 70)] == [one(step) for step in range(10)]
    assert [schedule(step).steady_lr for step in (39, 40, 49, 60)] == pytest.approx([0.1, 0.01, 0.1, 0.1])
    assert [schedule(step).weight_decay for step in (40, 50, 70)] == pytest.approx([0.04, 0.22, 0.4])
    assert [schedule.epochs(step) for step in (0, 39, 40, 59, 60, 69, 70)] == [4, 4, 6, 6, 7, 7, 7]


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_rates_reach_every_group(name: str, decay: str) -> None:
    """Networks that stay at the peak, vectors with a rate of their own, and weight decay where it is for."""
    module = nn.ModuleDict({"encoder": network(), "predictor": nn.Linear(3, 2, dtype=torch.float64)})
    optimizer = make_optimizer(options(name, 0.1, 0.5, decay=decay, vector_lr=0.25), module, ("predictor",))
    set_rates(optimizer, Rates(0.02, 0.1, 0.4))
    rates = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rates[p] = group["lr"], group.get("decay", group["weight_decay"])
    for place, p in module.named_parameters():
        expected = (0.1 if place.startswith("predictor") else 0.02) * (0.25 if p.dim() == 1 else 1)
        assert rates[p] == pytest.approx((expected, 0.4 if decay == "all" or p.dim() > 1 else 0.0)), place


def test_lars_decays_vectors_where_asked_to_without_scaling_them() -> None:
    module = nn.BatchNorm1d(3, dtype=torch.float64)
    optimizer = make_optimizer(options("lars", 0.5, 0.1, decay="all"), module)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    take_step(optimizer, GOOD)
    assert torch.allclose(module.weight, torch.full((3,), 1 - 0.5 * 0.1, dtype=torch.float64))
