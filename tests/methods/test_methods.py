"""Methods: losses over the global batch, keys in their places, what a step changes."""

import pathlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from support.forks import on_ranks, succeed
from support.steps import build, sample, small
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.config import make_config, parse_config
from fasttrain.engine.ranks import Ranks
from fasttrain.losses import regularisers
from fasttrain.losses.batch import batch_consistency, batch_uniformity, worst_compactness
from fasttrain.losses.queue import Decoupled, DecoupledWeighted, InfoNCE, QueueConsistency, QueueUniformity, queue_terms
from fasttrain.methods import Method, MethodOptions, Output, Progress, Sample, method_options, moco
from fasttrain.networks import shuffle
from fasttrain.system.collectives import gather_rows, sum_over_ranks
from fasttrain.system.errors import UserError
from fasttrain.system.options import flat
from fasttrain.views.spec import RECIPES

GOOD = torch.tensor(True)


@pytest.mark.parametrize("method", ["moco", "xmoco"])
def test_a_step_moves_query_then_key_encoder_and_queue(method: str) -> None:
    model = build(small(method, ema=0.5))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    loss, terms, carry, _ = model(sample(8))
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("key_"))
    assert not any(term.requires_grad for term in terms.values())
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(1.0)
    model.update(GOOD, Progress(), carry)
    weight = "encoder.0.0.weight"
    moved = model.state_dict()["key_" + weight]
    assert torch.allclose(moved, 0.5 * start["key_" + weight] + 0.5 * model.state_dict()[weight])
    assert int(model.queue.pointer) == 8
    assert not torch.equal(model.queue.keys_KD[:8], start["queue.keys_KD"][:8])
    assert torch.equal(model.queue.keys_KD[8:], start["queue.keys_KD"][8:])
    assert torch.allclose(model.queue.keys_KD.norm(dim=1), torch.ones(40), atol=1e-5)


def test_shuffled_keys_come_back_in_their_places() -> None:
    """In evaluation mode batch norm does not mix images, so the shuffle must not show."""
    plain, split = (build(small(batch_norm=kind)).eval() for kind in ("plain", "split"))
    image = sample(8).views[0][1]
    assert torch.allclose(plain._keys(plain._coming(image)), split._keys(split._coming(image)), atol=1e-5)


def test_keys_and_queries_of_an_image_are_normalised_in_different_groups() -> None:
    torch.manual_seed(0)
    model = build(small(batch_norm="split"))
    view = sample(64).views[0][0]
    q = model._embed(model.projector(model.encoder(view)))
    k = model._keys(model._coming(view))
    assert (q - k).abs().max() > 1e-3  # the weights are equal, the views are equal: only the groups differ


@pytest.mark.parametrize(
    ("ranks", "kind", "order"),
    [
        (1, "split", ["sent", "come", "key", "query"]),
        (2, "split", ["sent", "query", "come", "key"]),
        (2, "plain", ["key", "query"]),
    ],
)
def test_the_images_of_keys_travel_between_ranks_while_queries_are_encoded(
    ranks: int, kind: str, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none travel keys come first, which takes less memory."""
    seen = []

    def exchange(x: Tensor, *_: list[int]) -> Callable[[], Tensor]:
        def come() -> Tensor:
            seen.append("come")
            return x

        seen.append("sent")
        return come

    monkeypatch.setattr(shuffle, "exchange_rows", exchange)
    monkeypatch.setattr(moco, "world_size", lambda: ranks)
    model = build(small(batch_norm=kind))
    for network, name in ((model.encoder, "query"), (model.key_encoder, "key")):
        network.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    model(sample(8))
    assert seen == order


@pytest.mark.parametrize("method", ["moco", "xmoco"])
def test_decoupled_changes_the_contrast_alone(method: str) -> None:
    q, k = F.normalize(torch.randn(2, 8, 8), dim=2)
    losses = []
    for decoupled, weighted in ((False, False), (True, False), (False, True), (True, True)):
        options = {"decoupled": decoupled, "decoupled_weighted": weighted}
        model = build(small(method, **options, cross="none", uniform="none"))
        losses.append(model.loss(q, k, k)[0])
    queue = model.queue.keys_KD
    for loss, term in zip(losses, (InfoNCE, Decoupled, DecoupledWeighted, DecoupledWeighted), strict=True):
        assert torch.allclose(loss, queue_terms([term(0.2)], q, k, queue)[0])
    assert losses[1] < losses[0]


@pytest.mark.parametrize("method", ["moco", "xmoco"])
@pytest.mark.parametrize("cross", ["batch", "queue", "none"])
@pytest.mark.parametrize("uniform", ["batch", "queue", "none"])
def test_the_loss_is_the_weighted_sum_of_its_terms(method: str, cross: str, uniform: str) -> None:
    """The regularisers go with any method of queries and keys; xmoco is moco with both on."""
    config = small(
        method, cross=cross, cross_features="projection", uniform=uniform, cross_weight=3.0, uniform_weight=0.5,
        temperature=0.1, cross_temperature=0.2, cross_key_temperature=0.05, uniform_temperature=0.4,
    )  # fmt: skip
    model = build(config)
    q, k = F.normalize(torch.randn(2, 8, 8), dim=2)
    loss, terms = model.loss(q, k, k)
    queue = model.queue.keys_KD
    info_nce, consistency, uniformity = queue_terms(
        [InfoNCE(0.1), QueueConsistency(0.2, 0.05), QueueUniformity(0.4)], q, k, queue
    )
    expected = info_nce + 3 * {"batch": batch_consistency(q, k), "queue": consistency, "none": 0}[cross]
    expected = expected + 0.5 * {"batch": batch_uniformity(q, k, 0.4), "queue": uniformity, "none": 0}[uniform]
    assert torch.allclose(loss, expected, atol=1e-6)
    figures = {"contrastive_accuracy", "positive_similarity", "negative_similarity", "queue_filled"}
    regularisers = {name for name, on in (("cross", cross), ("uniform", uniform)) if on != "none"}
    assert set(terms) == {"contrast"} | regularisers | figures


@pytest.mark.parametrize(
    ("method", "pairs"),
    [("moco", 1), ("simclr", 2), ("cacr-queue", 3), ("hiclr", 3), ("cacr", 12), ("mv-infonce", 12), ("mv-dhel", 12)],
)
def test_compactness_looks_for_an_images_worst_among_all_its_pairs_of_views(
    method: str, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def recorded(given: list[tuple[Tensor, Tensor]]) -> Tensor:
        seen.extend(given)
        return worst_compactness(given)

    monkeypatch.setattr(regularisers, "worst_compactness", recorded)
    several = {"num_views": 4} if "num_views" in flat(make_config(method)) else {}
    model: Any = build(config := small(method, compactness=0.5, **several))
    model(sample(8, config=config))
    assert len({(float(q[0, 0].detach()), float(k[0, 0].detach())) for q, k in seen}) == len(seen) == pairs
    assert not any(torch.allclose(q, k) for q, k in seen)


def test_unknown_method_names_the_choices() -> None:
    with pytest.raises(UserError, match=r"choose from: moco, xmoco, .*or package\.module:Class"):
        make_config("mocko")


class Pull(Method):
    """Cosine distance of two views: the least that a method from outside may be."""

    def __init__(self, encoder: nn.Module, width: int, weight: float) -> None:
        super().__init__()
        self.encoder, self.projector, self.weight = encoder, nn.Linear(width, 4), weight

    def forward(self, given: Sample) -> Output:
        a, b = (self.projector(self.encoder(view)).float() for view in given.views[0])
        return Output(-self.weight * F.cosine_similarity(a, b).mean(), {})


@dataclass(frozen=True)
class PullOptions(MethodOptions):
    """Pulls two views together."""

    views: ClassVar = RECIPES["mocov1"]
    paper: ClassVar = {"lr": 0.7}
    presets: ClassVar = {"demo": {"pull_weight": 3.0}}

    pull_weight: float = 2.0
    """Weight of the pull."""

    def build(self, encoder: nn.Module, width: int) -> Method:
        return Pull(encoder, width, self.pull_weight)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("my_methods")
    module.PullOptions, module.number = PullOptions, 3
    monkeypatch.setitem(sys.modules, "my_methods", module)
    return "my_methods:PullOptions"


def test_a_method_from_outside_brings_its_own_options(outside: str) -> None:
    config = parse_config(["--data", "x", "--method", outside, "--pull-weight", "5"])
    assert (config.method.pull_weight, config.optimisation.lr) == (5.0, 0.7)
    assert make_config(outside, "demo").method.pull_weight == 3.0
    assert "queue_size" not in vars(config.method)
    model = build(make_config(outside, arch="small", size=16))
    assert model(sample(4)).loss.requires_grad


def test_a_method_from_outside_that_can_t_be_is_one_line(outside: str) -> None:
    for name, message in (
        ("nowhere.at_all:Options", "No module named 'nowhere'"),
        ("my_methods:Missing", "no attribute 'Missing'"),
        ("my_methods:number", "is not a dataclass that extends MethodOptions and has views"),
        ("fasttrain.methods:MethodOptions", "has views"),
        (":Options", "Empty module name"),
    ):
        with pytest.raises(UserError, match=message):
            method_options(name)


def read_as(readings: str) -> dict[str, Any]:
    """Options of both regularisers, read over the same."""
    return {"cross": readings, "uniform": readings.removesuffix("-within"), "cross_weight": 2.0}


def _global_batch(folder: pathlib.Path, method: str, readings: str) -> None:
    """One rank's share of a loss over the global batch: its gradient, averaged over ranks as DDP does."""
    ranks = Ranks("cpu")
    rank, world_size = ranks.rank, ranks.world_size
    q_MD, k_MD, queue = torch.load(folder / "inputs.pt")
    model = small(method, **read_as(readings)).method.build(nn.Identity(), 8)
    model.queue.keys_KD.copy_(queue)
    rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    q_ND = q_MD[rows].clone().requires_grad_()
    keys_MD = gather_rows(k_MD[rows])
    assert torch.equal(keys_MD, k_MD)
    assert torch.allclose(sum_over_ranks(q_ND.sum(0)), q_MD.sum(0))
    # a loss that each rank takes over its own rows against all: the gradient is that of the mean over the ranks
    own = q_MD[rows].clone().requires_grad_()
    (gather_rows(own) * (rank + 1)).square().sum().backward()
    factor = sum((other + 1) ** 2 for other in range(world_size))
    assert torch.allclose(own.grad, 2 * factor * q_MD[rows])
    loss, _ = model.loss(q_ND, k_MD[rows], keys_MD)
    loss.backward()
    torch.save((loss.detach(), q_ND.grad / world_size), folder / f"rank{rank}.pt")
    assert ranks.agree(rank) == 0
    assert ranks.agree(0) == world_size - 1
    assert ranks.share({"from": rank}) == {"from": 0}
    assert ranks.together(lambda: rank) == rank
    ranks.close()


@pytest.mark.parametrize(
    ("method", "readings", "world_size"),
    [
        ("moco", "none", 2),
        ("moco", "queue", 4),
        ("xmoco", "queue", 2),
        ("xmoco", "batch", 2),
        ("xmoco", "batch", 4),
        ("xmoco", "batch-within", 2),
    ],
)
def test_loss_and_gradient_over_ranks_equal_one_process(
    tmp_path: pathlib.Path, method: str, readings: str, world_size: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, queue = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (12, 12, 40))
    torch.save((q, k, queue), tmp_path / "inputs.pt")
    succeed(on_ranks(tmp_path, world_size, _global_batch, tmp_path, method, readings))
    model = small(method, **read_as(readings)).method.build(nn.Identity(), 8)
    model.queue.keys_KD.copy_(queue)
    whole = q.clone().requires_grad_()
    loss, _ = model.loss(whole, k, k)
    loss.backward()
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    assert torch.allclose(torch.stack([part[0] for part in parts]).mean(), loss, atol=1e-6)
    assert torch.allclose(torch.cat([part[1] for part in parts]), whole.grad, atol=1e-6)
