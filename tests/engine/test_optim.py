"""Optimizers against plain loops, steps that must change nothing, and the learning-rate schedule."""

import copy
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.engine.lamb import LAMB
from fasttrain.engine.optim import (
    LARS,
    MOMENTUM,
    Rates,
    Schedule,
    _apex_lamb,
    learning_rate,
    make_optimizer,
    set_rates,
    take_step,
)
from fasttrain.engine.options import OptimisationOptions

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


@pytest.mark.parametrize(("name", "shrinks"), [("sgd", True), ("lars", False), ("adamw", False), ("lamb", False)])
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


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "lamb"])
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


def lamb_by_loop(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    moments: list[tuple[torch.Tensor, torch.Tensor]],
    step: int,
    lr: float,
    decays: list[float],
) -> None:
    """You et al., algorithm 2 with φ(z) = z, one parameter after the other; apex's for those without weight decay."""
    for w, g, (m, v), decay in zip(weights, gradients, moments, decays, strict=True):
        m.copy_(0.9 * m + 0.1 * g)
        v.copy_(0.999 * v + 0.001 * g**2)
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + decay * w
        trust = w.norm() / update.norm() if decay and w.norm() > 0 and update.norm() > 0 else 1.0
        w.sub_(lr * trust * update)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 1e-14), (torch.float32, 1e-4, 1e-6)])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_lamb_is_the_papers(decay: str, dtype: torch.dtype, rtol: float, atol: float) -> None:
    module = network().to(dtype)
    with torch.no_grad():
        module[4].weight.zero_()  # a norm of 0: not scaled, until it has moved
    optimizer = make_optimizer(options("lamb", 0.05, 0.1, decay=decay), module)
    assert isinstance(optimizer, LAMB)
    weights = [p.detach().double() for p in module.parameters()]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    decays = [0.1 if decay == "all" or w.dim() > 1 else 0.0 for w in weights]
    for step in range(1, 6):
        give_gradients(module, step)
        lamb_by_loop(weights, [p.grad.double() for p in module.parameters()], moments, step, 0.05, decays)
        take_step(optimizer, GOOD)
        for p, w in zip(module.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach().double(), w, rtol=rtol, atol=atol)


def test_lamb_goes_on_from_its_state_and_counts_no_bad_step() -> None:
    module, other = network(), network()
    optimizer, resumed = (make_optimizer(options("lamb", 0.05, 0.1), m) for m in (module, other))
    for step, good in enumerate((GOOD, BAD, GOOD)):
        give_gradients(module, step)
        take_step(optimizer, good)
    state = copy.deepcopy(optimizer.state_dict())
    # the very form of apex's
    assert [group["step"] for group in state["param_groups"]] == [2, 2]
    assert all(type(group["step"]) is int for group in state["param_groups"])
    assert all(set(each) == {"exp_avg", "exp_avg_sq"} for each in state["state"].values())
    other.load_state_dict(module.state_dict())
    resumed.load_state_dict(state)
    for m, o in ((module, optimizer), (other, resumed)):
        give_gradients(m, 9)
        take_step(o, GOOD)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True))


def test_lamb_counts_the_steps_of_networks_that_stand_still_and_leaves_them_alone() -> None:
    """As apex does: a method may freeze some, by leaving them without gradients."""
    module = network()
    optimizer = make_optimizer(options("lamb", 0.05, 0.1), module)
    give_gradients(module, 0)
    module[4].weight.grad = None
    before = module[4].weight.detach().clone()
    take_step(optimizer, GOOD)
    assert torch.equal(module[4].weight, before)
    assert [group["step"] for group in optimizer.state_dict()["param_groups"]] == [1, 1]


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


def test_apexs_lamb_is_only_for_a_gpu_and_its_bad_steps_change_nothing(apex: type[torch.optim.SGD]) -> None:
    module = network()
    before = copy.deepcopy(module)
    assert type(make_optimizer(options("lamb", 0.1, 0.1), module)) is LAMB
    optimizer = _apex_lamb([{"params": list(module.parameters()), "weight_decay": 0.1}], 0.1)
    assert type(optimizer) is apex
    give_gradients(module, 0)
    take_step(optimizer, BAD)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True))
    take_step(optimizer, GOOD)
    assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True))


def test_without_apex_there_is_none_of_its(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    assert _apex_lamb([], 0.1) is None


@pytest.mark.gpu
def test_lamb_on_a_gpu_is_apexs_where_that_is_and_else_ours_is_the_cpus(
    apex: type[torch.optim.SGD], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = network().float()
    on_gpu = copy.deepcopy(module).cuda()
    assert type(make_optimizer(options("lamb", 0.1, 0.1), on_gpu)) is apex
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    optimizer, other = (make_optimizer(options("lamb", 0.05, 0.1), m) for m in (module, on_gpu))
    assert type(other) is LAMB
    for step, good in enumerate((BAD, GOOD, BAD, GOOD)):
        give_gradients(module, step)
        good_there = good.cuda()
        for p, q in zip(module.parameters(), on_gpu.parameters(), strict=True):
            q.grad = p.grad.cuda()
        take_step(optimizer, good)
        torch.cuda.set_sync_debug_mode("error")
        try:
            take_step(other, good_there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(module.parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "lamb"])
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
