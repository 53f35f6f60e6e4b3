"""MoCo v3, BYOL and SimSiam: networks as their papers have them, values of their losses, what a step moves."""

import math
import pathlib
import re
from typing import Any

import pytest
import torch
from support.forks import on_ranks, succeed
from support.steps import build, make, sample, small, take
from torch import nn
from torch.nn import functional as F

from fasttrain.config import make_config, parse_config
from fasttrain.engine.optim import Rates, make_optimizer, set_rates
from fasttrain.engine.ranks import Ranks
from fasttrain.losses.batch import batch_consistency, batch_info_nce, batch_uniformity
from fasttrain.methods import Method, Progress
from fasttrain.networks.momentum import cosine_momentum
from fasttrain.system.collectives import first_row, gather_rows
from fasttrain.system.errors import UserError

GOOD = torch.tensor(True)
METHODS = ["mocov3", "byol", "simsiam"]
WITH_MOMENTUM = ["mocov3", "byol"]


def layers(head: nn.Module) -> list[str]:
    """Each layer in short: widths of a linear one, with + for a bias; norm, with + for a scale and a shift."""
    names = []
    for layer in head.children():
        if isinstance(layer, nn.Linear):
            names.append(f"{layer.in_features}-{layer.out_features}{'' if layer.bias is None else '+'}")
        elif isinstance(layer, nn.BatchNorm1d):
            names.append("norm+" if layer.affine else "norm")
        else:
            names.append(type(layer).__name__.lower())
    return names


def around(method: str, width: int, **changes: Any) -> Any:
    """The method with its options' own widths, around an encoder without weights."""
    return make_config(method, **changes).method.build(nn.Flatten(), width)


def test_heads_of_mocov3_are_those_of_the_paper_s_resnet() -> None:
    model = around("mocov3", 2048)
    assert layers(model.projector) == ["2048-4096", "norm+", "relu", "4096-256", "norm"]
    assert layers(model.predictor) == ["256-4096", "norm+", "relu", "4096-256"]
    assert layers(model.momentum_projector) == layers(model.projector)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learned == 2048 * 4096 + 2 * 4096 + 4096 * 256 + 256 * 4096 + 2 * 4096 + 4096 * 256


def test_heads_of_byol_are_those_of_the_paper() -> None:
    model = around("byol", 2048)
    assert layers(model.projector) == ["2048-4096", "norm+", "relu", "4096-256"]
    assert layers(model.predictor) == ["256-4096", "norm+", "relu", "4096-256"]
    assert layers(model.momentum_projector) == layers(model.projector)


def test_heads_of_simsiam_are_those_of_the_paper() -> None:
    model = around("simsiam", 2048)
    hidden = ["2048-2048", "norm+", "relu"]
    assert layers(model.projector) == [*hidden, *hidden, "2048-2048", "norm"]
    assert layers(model.predictor) == ["2048-512", "norm+", "relu", "512-2048+"]
    assert layers(around("simsiam", 512, projector_layers=2).projector) == [
        "512-2048",
        *hidden[1:],
        "2048-2048",
        "norm",
    ]


def test_a_vision_transformer_has_the_paper_s_deeper_heads() -> None:
    model: Any = build(small("mocov3", arch="vit_tiny", patch_size=8))
    hidden = ["16-16", "norm+", "relu"]
    assert layers(model.projector) == ["192-16", *hidden[1:], *hidden, "16-8", "norm"]
    assert layers(model.predictor) == ["8-16", *hidden[1:], "16-8", "norm"]


def test_a_vision_transformer_s_patch_projection_stays_as_it_was_drawn() -> None:
    model, trainer = make("mocov3", arch="vit_tiny", patch_size=8)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for number in range(2):
        take(trainer, sample(8, number), number, 0.1)
    patches = ("encoder.conv_proj.weight", "encoder.conv_proj.bias")
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    for name in (*patches, *(f"momentum_{name}" for name in patches)):
        assert name not in moved
        assert id(model.get_parameter(name)) not in optimised
    assert {"encoder.class_token", "momentum_encoder.class_token"} <= moved


def test_a_vision_transformer_gets_the_paper_s_other_settings() -> None:
    config: Any = make_config("mocov3", arch="vit_small")
    step = config.optimisation
    assert (step.optimizer, step.lr, step.weight_decay, step.decay) == ("adamw", 1.5e-4, 0.1, "all")
    assert (step.warmup_epochs, step.epochs, step.batch_size) == (40, 300, 4096)
    assert (config.method.temperature, config.views.crop_scale, config.encoder.vit.vit_heads) == (0.2, (0.08, 1.0), 12)
    plain: Any = make_config("mocov3")
    assert (plain.optimisation.optimizer, plain.method.temperature, plain.views.crop_scale) == ("lars", 1.0, None)


@pytest.mark.parametrize("method", METHODS)
def test_residual_blocks_begin_as_their_shortcuts_in_all_networks(method: str) -> None:
    state = build(small(method, arch="resnet18", size=32)).state_dict()
    scales = [value for name, value in state.items() if "layer" in name and name.endswith("bn2.weight")]
    assert len(scales) == (16 if method in WITH_MOMENTUM else 8)
    assert all(bool((scale == 0).all()) for scale in scales)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_what_is_trained_alone(method: str) -> None:
    model = build(small(method))
    model(sample(8)).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("momentum_"), name


@pytest.mark.parametrize("method", METHODS)
def test_what_is_predicted_gives_the_encoder_no_gradient(method: str) -> None:
    """A prediction that does not depend on the image leaves only that way."""
    model: Any = build(small(method))
    last = [layer for layer in model.predictor if isinstance(layer, nn.Linear)][-1]
    del model.predictor[list(model.predictor).index(last) + 1 :]
    with torch.no_grad():
        last.weight.zero_()
    last.bias = nn.Parameter(torch.randn(last.out_features))
    model(sample(8)).loss.backward()
    assert last.bias.grad.abs().max() > 1e-4
    assert all(p.grad.abs().max() == 0 for p in (*model.encoder.parameters(), *model.projector.parameters()))


@pytest.mark.parametrize("method", WITH_MOMENTUM)
@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
def test_the_momentum_network_follows_by_a_momentum_that_rises_to_1(method: str, part: float) -> None:
    model = build(small(method, ema=0.5))
    with torch.no_grad():
        for p in (*model.encoder.parameters(), *model.projector.parameters()):
            p.add_(torch.randn_like(p))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.update(torch.tensor(False), Progress(part), ())
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    model.update(GOOD, Progress(part), ())
    momentum = cosine_momentum(0.5, part)
    for name, p in model.named_parameters():
        old, current = start[name], start[name.removeprefix("momentum_")]
        expected = torch.lerp(old, current, 1 - momentum) if name.startswith("momentum_") else old
        assert torch.allclose(p, expected, atol=1e-6), name
    assert (momentum == 1.0) == (part == 1.0)


def test_batch_norm_of_byol_s_momentum_network_has_the_statistics_of_its_batch() -> None:
    model: Any = build(small("byol"))
    views = sample(8).views[0][0]
    before = model.momentum_encoder[0][1].running_mean.clone()
    alone = model._target(views)
    assert not torch.equal(model.momentum_encoder[0][1].running_mean, before)
    assert not torch.allclose(alone[:4], model._target(torch.cat([views[:4], views[:4]]))[:4], atol=1e-3)


def test_the_predictor_of_simsiam_keeps_its_learning_rate() -> None:
    config = small("simsiam")
    model = build(config)
    optimizer = make_optimizer(config.optimisation, model, model.steady)
    set_rates(optimizer, Rates(0.1, 0.7, 0.0))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert rates[id(p)] == (0.7 if name.startswith("predictor.") else 0.1), name


def rows(count: int, seed: int, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


def value(model: Any, q: list[torch.Tensor], k: list[torch.Tensor]) -> float:
    return float(model.loss(q, k)[0])


def test_byol_is_0_for_equal_8_for_opposed_and_4_for_perpendicular_rows() -> None:
    model, axes = around("byol", 8, hidden=4, predictor_hidden=4), torch.eye(8, dtype=torch.float64)
    first, second = rows(6, 1), rows(6, 2)
    assert abs(value(model, [first, second], [first, second])) < 1e-12
    assert abs(value(model, [first, second], [-first, -second]) - 8) < 1e-12
    assert abs(value(model, [axes, axes], [axes.roll(1, 0), axes.roll(2, 0)]) - 4) < 1e-12


def test_byol_is_4_and_4_times_simsiam() -> None:
    byol = around("byol", 8, hidden=4, predictor_hidden=4)
    simsiam = around("simsiam", 8, hidden=4, predictor_hidden=4, dim=8)
    q, k = [rows(6, 1).requires_grad_(), rows(6, 2).requires_grad_()], [rows(6, 3), rows(6, 4)]
    losses = byol.loss(q, k)[0], 4 + 4 * simsiam.loss(q, k)[0]
    assert torch.allclose(*losses, atol=1e-12)
    for mine, other in zip(*(torch.autograd.grad(loss, q) for loss in losses), strict=True):
        assert torch.allclose(mine, other, atol=1e-13)


def test_simsiam_is_minus_1_for_equal_and_1_for_opposed_rows() -> None:
    model = around("simsiam", 8, hidden=4, predictor_hidden=4, dim=8)
    first, second = rows(6, 1), rows(6, 2)
    assert abs(value(model, [first, second], [first, second]) + 1) < 1e-12
    assert abs(value(model, [first, second], [-first, -second]) - 1) < 1e-12


@pytest.mark.parametrize(("m", "temperature", "expected"), [(4, 0.2, 0.0160098028), (2, 1.0, None), (8, 0.5, None)])
def test_mocov3_of_distinct_images_is_its_closed_form(m: int, temperature: float, expected: float | None) -> None:
    """4τ·log(1 + (M − 1)·exp(−1/τ)): both directions, each times 2τ."""
    model = around("mocov3", 8, hidden=4, predictor_hidden=4, temperature=temperature)
    axes = torch.eye(m, 8, dtype=torch.float64)
    loss = value(model, [axes, axes], [axes, axes])
    assert abs(loss - 4 * temperature * math.log1p((m - 1) * math.exp(-1 / temperature))) < 1e-12
    assert expected is None or abs(loss - expected) < 1e-9


def test_mocov3_is_2_tau_times_info_nce_of_both_directions() -> None:
    model = around("mocov3", 8, hidden=4, predictor_hidden=4, temperature=0.3)
    q, k = [rows(6, 1), rows(6, 2)], [rows(6, 3), rows(6, 4)]
    both = sum(batch_info_nce(*pair, 0.3, "reference") for pair in zip(q, k, strict=True))
    assert abs(value(model, q, k) - 2 * 0.3 * float(both)) < 1e-12
    assert value(model, q[::-1], k[::-1]) == pytest.approx(value(model, q, k), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_view_s_queries_meet_the_other_view_s_keys(method: str) -> None:
    """In evaluation mode images do not mix, and each row is the network's of one view."""
    model: Any = build(small(method)).eval()
    given, seen = sample(8), {}
    loss = model.loss
    model.loss = lambda q, k: seen.update(q=q, k=k) or loss(q, k)
    model(given)
    target = (model.encoder, model.projector)
    if method in WITH_MOMENTUM:
        target = (model.momentum_encoder, model.momentum_projector)
    for view in range(2):
        other = given.views[0][1 - view]
        query = model.predictor(model.projector(model.encoder(given.views[0][view])))
        assert torch.allclose(seen["q"][view], F.normalize(query, dim=1), atol=1e-6)
        assert torch.allclose(seen["k"][view], F.normalize(target[1](target[0](other)), dim=1), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_regularisers_are_means_over_the_directions(method: str) -> None:
    plain = around(method, 8, hidden=4, predictor_hidden=4, dim=8)
    both = around(
        method, 8, hidden=4, predictor_hidden=4, dim=8, cross="batch", uniform="batch", cross_weight=3.0,
        uniform_weight=0.5, uniform_temperature=0.4,
    )  # fmt: skip
    q, k = [rows(6, 1), rows(6, 2)], [rows(6, 3), rows(6, 4)]
    loss, terms = both.loss(q, k)
    pairs = list(zip(q, k, strict=True))
    cross = sum(batch_consistency(*pair) for pair in pairs) / 2
    uniform = sum(batch_uniformity(*pair, 0.4) for pair in pairs) / 2
    assert torch.allclose(terms["cross"], cross, atol=1e-12)
    assert torch.allclose(terms["uniform"], uniform, atol=1e-12)
    assert abs(float(loss) - value(plain, q, k) - 3 * float(cross) - 0.5 * float(uniform)) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "value"), [("cross", "queue"), ("cross", "queue-both"), ("uniform", "queue")])
def test_regularisers_over_a_queue_are_refused(
    method: str, name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = {"cross": ["batch", "batch-within", "none"], "uniform": ["batch", "none"]}[name]
    refused = f"--{name} can't be '{value}'; choose from: {', '.join(choices)}"
    with pytest.raises(UserError, match=refused):
        make_config(method, **{name: value})
    words = ["--data", "x", "--method", method, f"--{name}", value]
    if name == "cross":  # others depend on it, so it is looked at first
        with pytest.raises(UserError, match=refused):
            parse_config(words)
        return
    with pytest.raises(SystemExit, match="2"):
        parse_config(words)
    assert re.search(f"'{value}' for argument '--{name}'.*{', '.join(map(repr, choices))}", capsys.readouterr().err)


def test_micro_batches_are_for_losses_that_do_not_compare_images() -> None:
    with pytest.raises(UserError, match="compares the images of a batch"):
        make_config("mocov3", accumulate=2)
    assert all(make_config(method, accumulate=2) for method in ("byol", "simsiam"))


@pytest.mark.parametrize(
    ("method", "preset", "expected"),
    [
        ("mocov3", "imagenet", {"batch_size": 4096, "lr": 0.3, "trust": 0.001, "batch_norm": "sync", "ema": 0.99}),
        ("mocov3", "cifar10", {"batch_size": 256, "lr": 0.3, "trust": 0.02, "temperature": 0.2, "epochs": 1000}),
        ("mocov3", "stl10", {"batch_size": 256, "size": 96, "trust_clip": True, "recipe": "byol", "epochs": 400}),
        ("byol", "imagenet", {"batch_size": 4096, "lr": 0.2, "weight_decay": 1.5e-6, "ema": 0.996, "epochs": 1000}),
        ("byol", "imagenet100", {"batch_size": 256, "lr": 0.5, "predictor_hidden": 8192, "ema": 0.99, "epochs": 400}),
        ("byol", "cifar10", {"batch_size": 256, "lr": 1.0, "weight_decay": 1e-5, "warmup_epochs": 10}),
        ("simsiam", "imagenet", {"batch_size": 512, "lr": 0.05, "weight_decay": 1e-4, "warmup_epochs": 0.0}),
        ("simsiam", "cifar10", {"batch_size": 512, "lr": 0.03, "projector_layers": 2, "blur": (0.0,), "epochs": 800}),
    ],
)
def test_presets_have_the_values_of_their_sources(method: str, preset: str, expected: dict[str, Any]) -> None:
    config = make_config(method, preset)
    parts = (config.optimisation, config.method, config.views, config.encoder)
    for name, wanted in expected.items():
        assert [getattr(part, name) for part in parts if hasattr(part, name)] == [wanted], name


def _on_ranks(folder: pathlib.Path, method: str) -> None:
    """One rank's share of the loss: its gradients, averaged over ranks as DDP does."""
    ranks = Ranks("cpu")
    q_2MD, k_2MD = torch.load(folder / "inputs.pt")
    share = 12 // ranks.world_size
    own = slice(first_row(share), first_row(share) + share)
    q_2ND = [q[own].clone().requires_grad_() for q in q_2MD]
    k_2 = [gather_rows(k[own]) if method == "mocov3" else k[own] for k in k_2MD]
    loss, terms = regularised_method(method).loss(q_2ND, k_2)
    loss.backward()
    gradients = torch.stack([q.grad / ranks.world_size for q in q_2ND])
    torch.save((loss.detach(), gradients, terms), folder / f"rank{ranks.rank}.pt")
    ranks.close()


def regularised_method(method: str) -> Method:
    return around(method, 8, hidden=4, predictor_hidden=4, dim=8, cross="batch", uniform="batch", cross_weight=2.0)


@pytest.mark.parametrize(("method", "world_size"), [("mocov3", 2), ("mocov3", 4), ("byol", 2), ("simsiam", 4)])
def test_loss_terms_and_gradients_over_ranks_equal_one_process(
    tmp_path: pathlib.Path, method: str, world_size: int
) -> None:
    q, k = [rows(12, 1), rows(12, 2)], [rows(12, 3), rows(12, 4)]
    torch.save((q, k), tmp_path / "inputs.pt")
    succeed(on_ranks(tmp_path, world_size, _on_ranks, tmp_path, method))
    whole = [each.clone().requires_grad_() for each in q]
    loss, terms = regularised_method(method).loss(whole, k)  # type: ignore[operator]
    loss.backward()
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    assert torch.allclose(torch.stack([part[0] for part in parts]).mean(), loss, atol=1e-9)
    for view in range(2):
        assert torch.allclose(torch.cat([part[1][view] for part in parts]), whole[view].grad, atol=1e-9)
    for name, term in terms.items():
        assert torch.allclose(torch.stack([part[2][name] for part in parts]).mean(), term, atol=1e-9), name
