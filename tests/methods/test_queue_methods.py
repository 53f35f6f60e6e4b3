"""MoCo both ways, CO2, ReSSL, SCE and NNCLR: their networks, what a step moves, their settings."""

import pathlib
from typing import Any

import pytest
import torch
from support.forks import on_ranks, succeed
from support.steps import build, make, make_without_norm, sample, small, take
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.config import make_config, parse_config
from fasttrain.engine.optim import Rates
from fasttrain.engine.ranks import Ranks
from fasttrain.losses.queue import SCE, InfoNCE, ReSSL, queue_terms
from fasttrain.losses.regularisers import Regularisers
from fasttrain.methods import Method, Progress, Sample
from fasttrain.presets import PRESETS
from fasttrain.system.collectives import gather_rows
from fasttrain.system.options import flat

GOOD = torch.tensor(True)
METHODS = ["co2", "ressl", "sce", "nnclr"]
REGULARISED = {"cross": "queue-both", "uniform": "batch"}


def layers(network: nn.Module) -> list[str]:
    """A head as "2048>256" for a linear layer, with "+b" for a bias, "norm" or "bare norm", "relu"."""
    said = []
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            said.append(f"{layer.in_features}>{layer.out_features}" + ("+b" if layer.bias is not None else ""))
        elif isinstance(layer, nn.BatchNorm1d):
            said.append("norm" if layer.affine else "bare norm")
        elif isinstance(layer, nn.ReLU):
            said.append("relu")
    return said


def heads(method: str, preset: str = "imagenet", width: int = 2048) -> tuple[list[str], list[str]]:
    """Projector and predictor of a method around an encoder of a width."""
    built: Any = make_config(method, preset, queue_size=64).method.build(nn.Identity(), width)
    return layers(built.projector), layers(built.predictor)


def flipped(batch: Sample) -> Sample:
    return batch._replace(views=tuple(group.flip(0) for group in batch.views))


def test_networks_are_the_papers() -> None:
    assert heads("ressl") == (["2048>4096+b", "relu", "4096>512+b"], [])
    hidden = ["2048>2048", "norm", "relu"]
    assert heads("sce") == ([*hidden, *hidden, "2048>256", "bare norm"], ["256>4096", "norm", "relu", "4096>256"])
    assert heads("sce", "cifar10", 512) == (["512>512", "norm", "relu", "512>128+b"], [])
    assert heads("nnclr") == ([*hidden, *hidden, "2048>256", "norm"], ["256>4096", "norm", "relu", "4096>256+b"])
    assert heads("co2") == heads("moco") == (["2048>2048+b", "relu", "2048>128+b"], [])


OWN_TERMS = {"co2": {"cross"}, "nnclr": {"neighbour"}}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_what_it_should(method: str) -> None:
    config = small(method)
    model: Any = build(config)
    start = state(model)
    loss, terms, carry, _ = model(sample(8, config=config))
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    figures = {"contrastive_accuracy", "positive_similarity", "negative_similarity", "queue_filled"}
    assert set(terms) == {"contrast", *OWN_TERMS.get(method, ())} | figures
    assert not any(term.requires_grad for term in terms.values())
    model.update(torch.tensor(False), Progress(), carry)
    assert all(torch.equal(value, start[name]) for name, value in state(model).items())
    with torch.no_grad():
        model.encoder[0][0].weight.add_(1.0)
    model.update(GOOD, Progress(), carry)
    taken = sum(map(len, carry))
    assert int(model.queue.pointer) == taken == (16 if method == "sce" else 8)
    assert torch.equal(model.queue.keys_KD[:taken], torch.cat(carry))
    assert torch.equal(model.queue.keys_KD[taken:], start["queue.keys_KD"][taken:])
    assert torch.allclose(model.queue.keys_KD.norm(dim=1), torch.ones(40), atol=1e-5)
    if method != "nnclr":
        key, ema = start["key_encoder.0.0.weight"], config.method.ema
        moved = ema * key + (1 - ema) * model.encoder[0][0].weight
        assert torch.allclose(model.key_encoder[0][0].weight, moved)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the queue: what only an update may change."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value.clone() for name, value in model.state_dict().items() if not name.endswith(statistics)}


@pytest.mark.parametrize(("part", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_the_momentum_rises_to_its_end(part: float, share: float) -> None:
    model: Any = build(small("moco", ema=0.5, ema_end=1.0))
    key = model.key_encoder[0][0].weight.clone()
    with torch.no_grad():
        model.encoder[0][0].weight.add_(1.0)
    model.update(GOOD, Progress(part, 1.0), (torch.zeros(8, 8),))
    expected = share * key + (1 - share) * model.encoder[0][0].weight
    assert torch.allclose(model.key_encoder[0][0].weight, expected)


def test_terms_are_those_of_the_methods() -> None:
    q, k = F.normalize(torch.randn(2, 8, 8), dim=2)
    for method, term in (
        ("ressl", ReSSL(0.1, 0.04)), ("sce", SCE(0.1, 0.07, 0.3)), ("co2", InfoNCE(0.2)),
    ):  # fmt: skip
        changes = {"symmetric": False, "positive_weight": 0.3} if method == "sce" else {}
        model: Any = build(small(method, cross="none", **changes))
        assert torch.allclose(model.loss(q, k, k)[0], queue_terms([term], q, k, model.queue.keys_KD)[0])


def test_nnclr_keeps_the_first_view_s_embeddings() -> None:
    model: Any = build(small("nnclr"))
    given = sample(8)
    (kept,) = model(given).carry
    assert torch.allclose(kept, F.normalize(model.projector(model.encoder(given.views[0][0])), dim=1), atol=1e-6)


def test_co2_is_moco_with_consistency_both_ways() -> None:
    plain: Any = {"batch_norm": "plain"}  # split, the images of keys are dealt out anew each time
    both: Any = {"cross": "queue-both", "cross_weight": 1.0, "cross_temperature": 0.05}
    co2, moco = small("co2", **plain), small("moco", **both, **plain)
    assert flat(co2.method) == flat(moco.method)
    batch = sample(8)
    assert torch.equal(build(co2)(batch).loss, build(moco)(batch).loss)
    without = build(small("moco", **plain))(batch)
    for off in ({"cross": "none"}, {"cross_weight": 0.0}):
        assert torch.equal(build(small("co2", **off, **plain))(batch).loss, without.loss)


@pytest.mark.parametrize("method", ["moco", "xmoco", "sce"])
@pytest.mark.parametrize("regularised", [{}, REGULARISED, {"cross": "batch", "uniform": "queue"}])
def test_both_ways_is_the_mean_of_each_way(method: str, regularised: dict[str, Any]) -> None:
    options: Any = {"batch_norm": "plain", "ema": 0.5, **regularised}
    both, one = (build(small(method, symmetric=way, **options)) for way in (True, False))
    batch = sample(8)
    expected = (one(batch).loss + one(flipped(batch)).loss) / 2
    loss, _, carry, _ = both(batch)
    assert torch.allclose(loss, expected)
    assert torch.allclose(both(flipped(batch)).loss, expected)  # the views may be exchanged
    loss.backward()
    expected.backward()
    for ours, theirs in zip(both.parameters(), one.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad)
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert [len(keys) for keys in carry] == [8, 8]
    assert torch.allclose(carry[0], one(batch).carry[0])
    assert torch.allclose(carry[1], one(flipped(batch)).carry[0])


def test_both_ways_takes_all_keys_whatever_the_queue_holds() -> None:
    """40 keys are no multiple of the 16 that a step brings."""
    model, trainer = make(symmetric=True, batch_norm="split")
    brought = []
    for number in range(4):
        batch = sample(8, seed=number)
        trainer.forward_backward(batch)
        brought.append(torch.cat(trainer._carry).clone())
        trainer.update(number, Rates(0.1, 0.1, 1e-4))
    assert int(model.queue.pointer) == 64 % 40
    newest = torch.cat(brought)[-40:]
    assert torch.equal(model.queue.keys_KD.roll(-24, 0), newest)


def test_both_ways_in_micro_batches_is_the_whole_batch() -> None:
    outcomes = []
    for accumulate in (1, 2):
        model, trainer = make_without_norm(symmetric=True, accumulate=accumulate, **REGULARISED | {"uniform": "queue"})
        take(trainer, sample(8), 0, 0.1)
        outcomes.append(model)
    for one, other in zip(*(model.parameters() for model in outcomes), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert torch.allclose(*(model.queue.keys_KD for model in outcomes), atol=1e-6)


def test_each_view_of_both_ways_is_normalised_among_others() -> None:
    """Split batch norm: the weights and the views are equal, only the groups of images differ."""
    torch.manual_seed(0)
    model: Any = build(small(symmetric=True, batch_norm="split", batch_size=64))
    view = sample(64).views[0][0]
    query = model._query(model.encoder(view))
    first, second = model._keys(model._coming(view)), model._keys(model._coming(view))
    assert (query - first).abs().max() > 1e-3
    assert (first - second).abs().max() > 1e-3  # each call deals the images out anew


def test_ressl_queries_the_strong_view() -> None:
    strong, weak = small("ressl").recipe
    assert (strong.jitter_p, strong.blur_p, weak.jitter_p, weak.blur_p, weak.gray_p) == (0.8, 0.5, 0.0, 0.0, 0.0)
    model: Any = build(small("ressl", batch_norm="plain"))
    batch = sample(8)
    (keys,) = model(batch).carry
    assert torch.allclose(keys, model._keys(model._coming(batch.views[0][1])))


def test_nnclr_looks_up_neighbours_among_earlier_images_alone() -> None:
    model: Any = build(small("nnclr", batch_norm="plain"))
    batch = sample(8)
    first = model(batch)
    assert torch.equal(model(batch).loss, first.loss)  # a forward leaves the queue as it was
    assert first.terms["neighbour"] < 0.999
    (z_MD,) = first.carry
    model.update(GOOD, Progress(), first.carry)
    assert torch.allclose(model._neighbours(z_MD), z_MD, atol=1e-6)  # from the next step on they are there to be found
    again = model(batch)
    assert again.terms["neighbour"] > first.terms["neighbour"]


def test_nnclr_gives_gradient_to_predictions_alone() -> None:
    model: Any = build(small("nnclr"))
    p, z = (F.normalize(torch.randn(16, 8), dim=1).requires_grad_() for _ in range(2))
    loss, terms = model.loss(p, z.detach(), z.detach())
    loss.backward()
    assert z.grad is None
    assert p.grad.abs().min() > 0
    figures = {"contrastive_accuracy", "positive_similarity", "negative_similarity", "queue_filled"}
    assert set(terms) == {"contrast", "neighbour"} | figures
    assert not any(term.requires_grad for term in terms.values())


def test_nnclr_takes_the_decoupled_forms() -> None:
    batch = sample(8)
    losses = [
        build(small("nnclr", **form))(batch).loss for form in ({}, {"decoupled": True}, {"decoupled_weighted": True})
    ]
    assert losses[1] < losses[0]
    assert losses[2] != losses[1]


@pytest.mark.parametrize("method", ["moco", "xmoco", *METHODS])
@pytest.mark.parametrize("cross", ["batch", "batch-within", "queue", "queue-both", "none"])
def test_every_method_with_a_queue_takes_every_consistency(method: str, cross: str) -> None:
    config = small(method, cross=cross, uniform="queue")
    out = build(config)(sample(8, config=config))
    assert out.loss.isfinite()
    assert ("cross" in out.terms) == (cross != "none")
    assert "uniform" in out.terms


def _own_rows(folder: pathlib.Path, method: str) -> None:
    """One rank's share of a loss of both directions; its gradient averaged over ranks, as DDP does."""
    ranks = Ranks("cpu")
    mine = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    loss, gradient = _both(folder, method, mine)
    torch.save((loss, gradient / ranks.world_size), folder / f"rank{ranks.rank}.pt")
    ranks.close()


def _both(folder: pathlib.Path, method: str, mine: slice) -> tuple[Tensor, Tensor]:
    """The loss of these rows of both directions, and its gradient (2, rows, D)."""
    q_2MD, k_2MD, queue = torch.load(folder / "inputs.pt")
    symmetric = {} if method == "nnclr" else {"symmetric": True}
    model: Any = small(method, **symmetric, **REGULARISED).method.build(nn.Identity(), 8)
    model.queue.keys_KD.copy_(queue)
    q_2ND = q_2MD[:, mine].clone().requires_grad_()
    keys = torch.cat([gather_rows(k_MD[mine]) for k_MD in k_2MD])
    loss, _ = model.loss(q_2ND.flatten(0, 1), k_2MD[:, mine].flatten(0, 1), keys)
    loss.backward()
    return loss.detach(), q_2ND.grad


@pytest.mark.parametrize(("method", "world_size"), [("moco", 2), ("sce", 4), ("nnclr", 2)])
def test_both_ways_over_ranks_equals_one_process(tmp_path: pathlib.Path, method: str, world_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = F.normalize(torch.randn(2, 2, 12, 8, generator=generator), dim=3)
    queue = F.normalize(torch.randn(40, 8, generator=generator), dim=1)
    torch.save((q, k, queue), tmp_path / "inputs.pt")
    succeed(on_ranks(tmp_path, world_size, _own_rows, tmp_path, method))
    loss, gradient = _both(tmp_path, method, slice(0, 12))
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    assert torch.allclose(torch.stack([part[0] for part in parts]).mean(), loss, atol=1e-6)
    assert torch.allclose(torch.cat([part[1] for part in parts], dim=1), gradient, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", ["moco", *METHODS])
def test_every_preset_makes_a_configuration(method: str, preset: str) -> None:
    config = make_config(method, preset)
    assert config.run.preset == preset
    assert config.method.views


SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("ressl", "imagenet"): {
        "lr": 0.05, "decay": "matrices", "warmup_epochs": 5, "batch_norm": "split", "queue_size": 131072, "ema": 0.999,
        "temperature": 0.1, "key_temperature": 0.04,
    },
    ("ressl", "cifar10"): {"lr": 0.05, "dim": 256, "ema": 0.99, "ema_end": 1.0, "batch_size": 256, "epochs": 1000},
    ("sce", "imagenet"): {
        "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6, "batch_size": 4096, "symmetric": True, "ema": 0.99,
        "ema_end": 1.0, "key_temperature": 0.07, "positive_weight": 0.5,
    },
    ("sce", "cifar10"): {
        "optimizer": "sgd", "lr": 0.06, "weight_decay": 5e-4, "recipe": "weak-key", "symmetric": False, "ema": 0.99,
        "ema_end": None, "queue_size": 4096, "key_temperature": 0.05,
    },
    ("nnclr", "imagenet"): {
        "optimizer": "lars", "lr": 0.3, "epochs": 1000, "batch_norm": "sync", "queue_size": 98304, "temperature": 0.1,
    },
    ("nnclr", "cifar10"): {
        "lr": 0.4, "trust": 0.02, "trust_clip": True, "recipe": "cifar-asymmetric", "queue_size": 65536,
        "temperature": 0.2,
    },
    ("moco", "imagenet100"): {"symmetric": True, "lr": 0.3, "dim": 256, "ema": 0.99, "ema_end": 0.999},
    ("moco", "cifar10"): {"symmetric": False, "lr": 0.03, "ema": 0.99, "ema_end": None, "queue_size": 4096},
    ("co2", "imagenet"): {"cross": "queue-both", "cross_weight": 1.0, "cross_temperature": 0.05, "lr": 0.03},
}  # fmt: skip


@pytest.mark.parametrize(("method", "preset"), SETTINGS)
def test_settings_are_those_of_their_sources(method: str, preset: str) -> None:
    values, expected = flat(make_config(method, preset)), SETTINGS[method, preset]
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "paper", "options"),
    [
        ("moco", "v2+", ["--symmetric", "--ema-end"]),
        ("co2", "2010.02217", ["--symmetric"]),
        ("ressl", "2107.09282", ["--hidden", "--key-temperature"]),
        ("sce", "2111.14585", ["--positive-weight", "--predictor-hidden"]),
        ("nnclr", "2104.14548", ["--decoupled-weighted", "--queue-size"]),
    ],
)
def test_help_names_paper_and_options(
    method: str, paper: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--method", method, "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(option in said for option in ["queue-both", *options])
    assert paper in said + (type(make_config(method).method).__doc__ or "")


def test_options_and_their_bounds() -> None:
    config = parse_config(["--data", "x", "--method", "sce", "--positive-weight", "0.2", "--ema-end", "None"])
    method: Any = config.method
    assert (method.positive_weight, method.ema_end) == (0.2, None)
    assert method.regularisers == Regularisers()
    built: Method = build(small("sce", head="cifar", predictor_hidden=4096))
    assert isinstance(built, Method)
