"""SwAV: networks, prototypes and queue from step to step, the global batch."""

import math
import pathlib
from typing import Any

import pytest
import torch
from support.forks import on_ranks, succeed
from support.steps import build, sample, small, take
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.config import make_config
from fasttrain.engine.ranks import Ranks
from fasttrain.engine.step import TrainStep
from fasttrain.losses import reference
from fasttrain.losses.multi_crop import crop_cross_entropy
from fasttrain.methods import Progress, Sample
from fasttrain.networks.prototypes import Prototypes

GOOD = torch.tensor(True)


def made(**changes: Any) -> tuple[Any, TrainStep, Sample]:
    """A method without older images unless asked for, its step, and views for it."""
    config = small("swav", **{"queue_size": 0, "freeze_epochs": 0.0} | changes)
    model = build(config)
    return model, TrainStep(model, config.optimisation, torch.device("cpu")), sample(8, config=config)


def test_networks_are_the_paper_s() -> None:
    model = make_config("swav").method.build(nn.Identity(), 2048)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in layers] == [
        (2048, 2048, False), (2048, 128, True), (128, 3000, False)
    ]  # fmt: skip
    assert sum(isinstance(m, nn.BatchNorm1d) for m in model.modules()) == 1
    assert model.queue is None


def test_the_loss_is_the_paper_s_over_views_of_two_sizes() -> None:
    """Each view by itself through networks in evaluation mode, where images do not meet."""
    model, _, views = made()
    model.eval()
    assert [tuple(group.shape[:2]) for group in views.views] == [(2, 8), (6, 8)]
    z = [F.normalize(model.projector(model.encoder(view)), dim=1) for group in views.views for view in group]
    scores = [view @ model.prototypes.weight.T for view in z]
    pairs = []
    for a in range(2):
        target = reference.sinkhorn(scores[a].detach(), 0.05)
        pairs += [-(target * (s / 0.1).log_softmax(1)).sum(1).mean() for v, s in enumerate(scores) if v != a]
    expected = torch.stack(pairs).mean()
    loss, terms, *_ = model(views)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(terms["entropy"] + terms["kl"], expected, atol=1e-5)
    networks = [model.encoder, model.projector, model.prototypes]
    for found, wanted in zip(*(_gradient(value, networks) for value in (loss, expected)), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def _gradient(loss: Tensor, networks: list[nn.Module]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [p for network in networks for p in network.parameters()])


def test_prototypes_move_as_where_they_are_normalised_before_every_forward() -> None:
    torch.manual_seed(0)
    ours = Prototypes(4, 7).double()
    ours.normalise(GOOD)
    theirs = nn.Parameter(ours.weight.detach().clone())
    steps = [torch.optim.SGD([p], lr=0.5, momentum=0.9, weight_decay=0.1) for p in (ours.weight, theirs)]
    for _ in range(4):
        x, target = torch.randn(3, 5, 4, dtype=torch.float64), torch.rand(2, 5, 7, dtype=torch.float64).softmax(2)
        with torch.no_grad():
            theirs.copy_(F.normalize(theirs, dim=1))
        for weight, step in zip((ours.weight, theirs), steps, strict=True):
            step.zero_grad()
            crop_cross_entropy(x, weight, target, 0.1).backward()
            step.step()
        ours.normalise(GOOD)
    assert torch.allclose(ours.weight, F.normalize(theirs, dim=1), atol=1e-12)


def test_prototypes_keep_unit_length_and_stay_after_a_step_that_is_not_finite() -> None:
    model, trainer, views = made()
    take(trainer, views, 0, 0.5)
    weight = model.prototypes.weight.detach().clone()
    assert torch.allclose(weight.norm(dim=1), torch.ones(12))
    take(trainer, views._replace(views=tuple(group * torch.nan for group in views.views)), 1, 0.5)
    assert torch.equal(model.prototypes.weight, weight)
    take(trainer, views, 2, 0.5)
    assert not torch.allclose(model.prototypes.weight, weight)


def test_prototypes_are_frozen_at_first() -> None:
    model, trainer, views = made(freeze_epochs=1.0)
    start = model.prototypes.weight.detach().clone()
    head = model.projector[-1].weight.detach().clone()
    take(trainer, views._replace(progress=Progress(0.99, 10)), 0, 0.5)
    assert torch.allclose(model.prototypes.weight, start, atol=1e-6)  # normalised again
    assert not torch.equal(model.projector[-1].weight, head)
    take(trainer, views._replace(progress=Progress(1.0, 10)), 1, 0.5)
    assert not torch.allclose(model.prototypes.weight, start)


def test_the_queue_is_used_once_it_is_full_and_its_epoch_has_come() -> None:
    model, trainer, views = made(queue_size=12, queue_epoch=2.0)
    early, late = (views._replace(progress=Progress(epoch, 10)) for epoch in (1.9, 2.0))
    alone = made()[0]

    def same(given: Sample) -> bool:
        """As without a queue: what the running statistics of batch norm become has no part in it."""
        alone.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("queue")})
        return torch.equal(model(given).loss, alone(given).loss)

    take(trainer, early, 0, 0.1)
    assert not model.queue.is_full  # 8 of 12
    assert same(early)
    assert math.isclose(*(float(m(late).loss.detach()) for m in (model, alone)), rel_tol=1e-6)
    carry = model(late).carry
    assert torch.allclose(carry[0].unflatten(1, (2, 8)).norm(dim=2), torch.ones(8, 2), atol=1e-6)
    model.update(GOOD, Progress(), carry)
    assert model.queue.is_full
    assert torch.equal(model.queue.keys_KD[:4], carry[0][4:])
    assert same(early)
    assert not same(late)


def test_the_queue_s_rows_are_scored_by_the_prototypes_as_they_are_now() -> None:
    model, *_ = made(queue_size=12, queue_epoch=0.0)
    model.queue.enqueue(F.normalize(torch.randn(12, 2, 8), dim=2).flatten(1))
    older = model.queue.keys_KD.unflatten(1, (2, 8))
    z = F.normalize(torch.randn(2, 8, 8), dim=2)
    weight = model.prototypes.weight
    for view in range(2):
        joint = torch.cat([z[view], older[:, view]]) @ weight.T
        expected = reference.sinkhorn(joint, 0.05)[:8]
        assert torch.allclose(model._assigned(z, Progress())[view], expected, atol=1e-5)


def _step(folder: pathlib.Path, count: int) -> None:
    """A step on this rank's share of twelve images, with ten older ones: its loss and the queue go into a file."""
    ranks = Ranks("cpu")
    model, trainer, _ = made(queue_size=10, queue_epoch=0.0, batch_norm="sync", batch_size=12)
    generator = torch.Generator().manual_seed(1)
    model.queue.enqueue(F.normalize(torch.randn(10, 2, 8, generator=generator), dim=2).flatten(1))
    whole = sample(12, 0, small("swav"))
    at = slice(ranks.rank * 12 // count, (ranks.rank + 1) * 12 // count)
    share = tuple(group[:, at] for group in whole.views)
    terms = ranks.mean(take(trainer, Sample(share, None, whole.index_B[at]), 0, 0.1))
    torch.save((terms, model.queue.keys_KD, model.queue.pointer), folder / f"rank{ranks.rank}-{count}.pt")
    ranks.close()


@pytest.mark.parametrize("count", [2, 4])
def test_older_images_count_once_on_several_ranks(tmp_path: pathlib.Path, count: int) -> None:
    succeed(on_ranks(tmp_path, count, _step, tmp_path, count))
    _step(tmp_path, 1)
    terms, keys, pointer = torch.load(tmp_path / "rank0-1.pt")
    for rank in range(count):
        own_terms, own_keys, own_pointer = torch.load(tmp_path / f"rank{rank}-{count}.pt")
        for name, value in terms.items():
            assert float(own_terms[name]) == pytest.approx(float(value), rel=1e-4), name
        assert torch.allclose(own_keys, keys, atol=1e-4)
        assert own_pointer == pointer == 2


@pytest.mark.parametrize("recipe", ["simclr", "dino"])
def test_small_crops_are_as_many_as_the_recipe_has(recipe: str) -> None:
    config = small("swav", recipe=recipe, queue_size=0)
    assert build(config)(sample(4, config=config)).loss.isfinite()
