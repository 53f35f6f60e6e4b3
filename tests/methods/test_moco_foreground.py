"""MoCo with a contrast of foregrounds: its value and gradient, its queue, and what it is where all is foreground."""

from typing import Any

import pytest
import torch
from support.steps import build, make, sample, small, take
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.config import make_config
from fasttrain.losses import reference
from fasttrain.methods import Progress
from fasttrain.networks import foreground
from fasttrain.networks.foreground import saliency
from fasttrain.system.errors import UserError

OPTIONS: dict[str, Any] = {"foreground": 0.7, "batch_norm": "plain", "size": 32}


def model_and_views(seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """In evaluation mode, so that each view of an image stands for itself."""
    config = small("moco", **OPTIONS | options)
    model = build(config).eval()
    with torch.no_grad():
        for p in model.key_encoder.parameters():  # keys of another network
            p.mul_(1.1)
    return model, sample(8, seed, config)


def regions(encoder: Any, view: Tensor) -> tuple[Tensor, Tensor]:
    """Foreground and background of every image, one at a time."""
    maps = nn.Sequential(*list(encoder)[:5])(view)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for image, a in zip(maps, F.adaptive_avg_pool2d(saliency(view), maps.shape[2:]), strict=True):
        for weight, rows in zip((a, 1 - a), found, strict=True):
            rows.append((weight * image).sum((1, 2)) / weight.sum())
    return torch.stack(found[0]), torch.stack(found[1])


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_term_and_its_gradient_are_those_of_the_formula(symmetric: bool) -> None:
    model, given = model_and_views(symmetric=symmetric)
    loss, terms, _, _ = model(given)
    loss.backward()
    weights = model.encoder[1].conv1.weight, model.projector[0].weight
    found = [weight.grad.clone() for weight in weights]
    alone = torch.stack([
        reference.info_nce(*rows, model.region_queue.keys_KD, 0.2) for rows in directions(model, given, symmetric, True)
    ]).mean()  # fmt: skip
    host = torch.stack([
        reference.info_nce(*rows, model.queue.keys_KD, 0.2) for rows in directions(model, given, symmetric, False)
    ]).mean()  # fmt: skip
    assert torch.allclose(terms["foreground"], alone, atol=1e-5)
    assert torch.allclose(terms["contrast"], host, atol=1e-5)
    assert torch.allclose(loss, host + 0.7 * alone, atol=1e-5)
    for gradient, expected in zip(found, torch.autograd.grad(host + 0.7 * alone, weights), strict=True):
        assert torch.allclose(gradient, expected, atol=1e-4 * float(expected.abs().max()))
    assert 0 < terms["foreground_area"] < 1
    assert 0 <= terms["foreground_accuracy"] <= 1


def directions(model: Any, given: Any, symmetric: bool, of_foreground: bool) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of whole images or of foregrounds."""

    def rows(encoder: Any, projector: Any, view: Tensor) -> Tensor:
        return F.normalize(projector(regions(encoder, view)[0] if of_foreground else encoder(view)), dim=1)

    made = []
    for query, key in ((0, 1), (1, 0))[: 2 if symmetric else 1]:
        q_ND = rows(model.encoder, model.projector, given.views[0][query])
        made.append((q_ND, rows(model.key_encoder, model.key_projector, given.views[0][key]).detach()))
    return made


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"decoupled": True}, {"decoupled_weighted": True}])
def test_where_all_is_foreground_the_term_is_the_hosts(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    """With the same queue; background is then the whole, too."""
    monkeypatch.setattr(foreground, "saliency", lambda view: torch.ones(len(view), 16, 16))
    model, given = model_and_views(**options)
    model.region_queue.keys_KD.copy_(model.queue.keys_KD)
    loss, terms, carry, _ = model(given)
    assert torch.allclose(terms["foreground"], terms["contrast"], atol=1e-6)
    assert torch.allclose(loss, 1.7 * terms["contrast"], atol=1e-5)
    assert torch.equal(terms["foreground_accuracy"], terms["contrastive_accuracy"])
    assert float(terms["foreground_area"]) == 1
    keys, of_regions = carry[: len(carry) // 2], carry[len(carry) // 2 :]
    for k_MD, region_MR in zip(keys, of_regions, strict=True):
        assert torch.allclose(region_MR, torch.cat([k_MD, k_MD], 1), atol=1e-6)


@pytest.mark.parametrize("batch_norm", ["plain", "split"])
def test_a_queue_of_its_own_takes_foreground_and_background_keys_in_turn(batch_norm: str) -> None:
    """Also of images that travel to be encoded."""
    model, given = model_and_views(batch_norm=batch_norm, queue_size=16, cross="batch", cross_features="encoder")
    _, _, carry, _ = model(given)
    before = model.region_queue.keys_KD.clone()
    model.update(torch.tensor(False), Progress(), carry)
    assert torch.equal(model.region_queue.keys_KD, before)
    with torch.no_grad():
        both = [F.normalize(model.key_projector(rows), dim=1) for rows in regions(model.key_encoder, given.views[0][1])]
    model.update(torch.tensor(True), Progress(), carry)
    assert torch.allclose(model.region_queue.keys_KD, torch.stack(both, 1).flatten(0, 1), atol=1e-5)
    assert int(model.queue.pointer) == 8
    assert bool(model.region_queue.is_full)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("moco", {"negatives": "meow", "clusters": (2, 5), "feature_transform": True}),
        ("moco", {"negatives": "adameow", "symmetric": True, "accumulate": 2}),
        ("xmoco", {"symmetric": True, "accumulate": 2, "compactness": 0.3}),
        ("co2", {"uniform": "queue", "head": "linear"}),
    ],
)
def test_it_goes_with_all_else_that_moco_has(method: str, options: dict) -> None:
    built, step = make(method, foreground=1.0, batch_size=16, **options)
    for number in range(2):
        terms = take(step, sample(16, number), number, 0.05)
        assert terms["loss"].isfinite()
        assert {"foreground", "foreground_accuracy", "foreground_area", "contrast"} <= terms.keys()
    assert step.skips_3.tolist()[0] == 0
    rows = 2 * 2 * 16 * (2 if options.get("symmetric") else 1)
    assert int(built.region_queue.written) == min(rows, len(built.region_queue.keys_KD))


def test_without_it_there_is_no_queue_and_no_hook() -> None:
    plain, other = build(small("moco")), build(small("moco", foreground=1.0))
    assert not any(module._forward_hooks for module in plain.modules())
    assert {name for name in other.state_dict() if name not in plain.state_dict()} == {
        "region_queue.keys_KD", "region_queue.pointer", "region_queue.written"
    }  # fmt: skip
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("arch", [{"arch": "vit_tiny", "size": 32}, {"arch": "vit_tiny", "size": 64}])
def test_encoders_without_a_map_are_refused(arch: dict) -> None:
    with pytest.raises(UserError, match="--foreground needs a convolutional encoder"):
        build(make_config("moco", foreground=1.0, **arch))


def test_views_that_leave_one_place_are_refused() -> None:
    model = build(small("moco", foreground=1.0, arch="resnet18", size=32))
    with pytest.raises(UserError, match="views of 32 px leave one: take a larger --size, or --cifar-stem"):
        model(sample(8, 0, small("moco", size=32)))
