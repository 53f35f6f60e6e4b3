"""DINO: networks, teacher and centre from step to step, gradients that are clipped and dropped."""

from typing import Any

import pytest
import torch
from support.steps import build, sample, small, take
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from fasttrain.config import make_config
from fasttrain.engine.step import TrainStep
from fasttrain.methods import Progress, Sample

NETWORKS = ("encoder", "projector", "prototypes")


def made(**changes: Any) -> tuple[Any, TrainStep, Sample]:
    """A method, its step, and views for it."""
    config = small("dino", **{"freeze_epochs": 0.0} | changes)
    model = build(config)
    return model, TrainStep(model, config.optimisation, torch.device("cpu")), sample(8, config=config)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_networks_are_the_paper_s() -> None:
    model = make_config("dino").method.build(nn.Identity(), 384)
    layers = [m for m in [*model.projector.modules(), model.prototypes] if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in layers] == [
        (384, 2048, True), (2048, 2048, True), (2048, 256, True), (256, 65536, False)
    ]  # fmt: skip
    assert [type(m) for m in model.projector] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    for layer in layers[:3]:
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.01)
        assert not layer.bias.any()
    assert torch.allclose(model.prototypes(torch.eye(256)).norm(dim=0), torch.ones(65536))
    assert model.centre.shape == (65536,)


def test_batch_norm_in_the_head_stands_before_each_activation() -> None:
    model, *_ = made(head_norm=True)
    one = [nn.Linear, nn.BatchNorm1d, nn.GELU]
    assert [type(layer) for layer in model.projector] == [*one, *one, nn.Linear]


def test_the_teacher_is_evaluated_takes_no_gradient_and_begins_as_the_student() -> None:
    model, *_ = made()
    encoder, projector = model.evaluated
    assert encoder is model.momentum_encoder
    assert projector is model.momentum_projector
    for name in NETWORKS:
        pairs = zip(getattr(model, name).parameters(), getattr(model, f"momentum_{name}").parameters(), strict=True)
        for student, teacher in pairs:
            assert torch.equal(student, teacher)
            assert student.requires_grad
            assert not teacher.requires_grad


def test_only_the_student_s_paths_drop() -> None:
    model = build(small("dino", arch="vit_tiny", size=32, recipe="byol"))
    rates = [m.p for m in model.encoder.modules() if isinstance(m, StochasticDepth)]
    assert max(rates) == pytest.approx(0.1)
    assert not any(m.p for m in model.momentum_encoder.modules() if isinstance(m, StochasticDepth))


def test_the_loss_is_the_paper_s_over_views_of_two_sizes() -> None:
    """Each view by itself through networks in evaluation mode, where images do not meet."""
    model, _, views = made(teacher_temperature=0.07, teacher_warmup_epochs=10.0)
    model.eval()
    model.centre.copy_(torch.randn(12) / 10)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.mul_(1.1)
    views = views._replace(progress=Progress(5, 20))

    def logits(name: str, view: Tensor) -> Tensor:
        encoder, projector, prototypes = (getattr(model, name + part) for part in NETWORKS)
        weight = prototypes.weight / prototypes.weight.norm(dim=1, keepdim=True)
        return F.normalize(projector(encoder(view)), dim=1) @ weight.T

    student = [logits("", view) for group in views.views for view in group]
    teacher = [logits("momentum_", view).detach() for view in views.views[0]]
    assert (len(student), len(teacher)) == (10, 2)
    targets = [torch.softmax((view - model.centre) / 0.055, 1) for view in teacher]
    pairs = [
        -(target * (s / 0.1).log_softmax(1)).sum(1).mean()
        for a, target in enumerate(targets) for v, s in enumerate(student) if v != a
    ]  # fmt: skip
    expected = torch.stack(pairs).mean()
    loss, terms, (mean,), _ = model(views)
    assert len(pairs) == 18
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(terms["entropy"] + terms["kl"], expected, atol=1e-5)
    assert torch.allclose(mean[0], torch.cat(teacher).mean(0), atol=1e-6)
    students = [p for p in model.parameters() if p.requires_grad]
    for found, wanted in zip(*(torch.autograd.grad(value, students) for value in (loss, expected)), strict=True):
        assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_centre_moves_by_the_mean_over_micro_batches() -> None:
    model, *_ = made()
    means = torch.randn(2, 12)
    model.update(torch.tensor(True), Progress(), (means,))
    assert torch.allclose(model.centre, 0.1 * means.mean(0), atol=1e-7)


def test_a_step_moves_the_centre_and_the_teacher_after_it_was_used() -> None:
    model, trainer, views = made(ema=0.75)
    start = copied(model)
    progress = Progress(5, 10)  # half of the way: the momentum is halfway from 0.75 to 1
    views = views._replace(progress=progress)
    (mean,) = model(views).carry
    model.load_state_dict(start)  # that moved running statistics
    take(trainer, views, 0, 0.5)
    end = copied(model)
    assert torch.allclose(end["centre"], 0.1 * mean[0], atol=1e-7)
    for name in ("encoder.0.0.weight", "projector.2.bias", "prototypes.weight"):
        moved = 0.875 * start[name] + 0.125 * end[name]
        assert not torch.equal(start[name], end[name])
        assert torch.allclose(end[f"momentum_{name}"], moved, atol=1e-6)
    broken = views._replace(views=tuple(group * torch.nan for group in views.views))
    take(trainer, broken, 1, 0.5)
    assert all(torch.equal(value, end[name]) for name, value in copied(model).items())


def test_prototypes_are_frozen_at_first() -> None:
    model, trainer, views = made(freeze_epochs=1.0)
    start = model.prototypes.weight.detach().clone()
    take(trainer, views._replace(progress=Progress(0.99, 10)), 0, 0.5)
    assert torch.equal(model.prototypes.weight, start)
    take(trainer, views._replace(progress=Progress(1.0, 10)), 1, 0.5)
    assert not torch.equal(model.prototypes.weight, start)


@pytest.mark.parametrize(("clip", "norms"), [(3.0, [0, 2, 3, 3]), (0.0, [0, 2, 5, 400])])
def test_gradients_are_clipped_each_by_itself(clip: float, norms: list[float]) -> None:
    model, *_ = made(clip_each=clip)
    parameters = [p for p in model.parameters() if p.requires_grad][:4]
    for p, norm in zip(parameters, (0.0, 2.0, 5.0, 400.0), strict=True):
        p.grad = torch.full_like(p, norm / p.numel() ** 0.5)
    model.after_backward(Progress())
    assert [float(p.grad.norm()) for p in parameters] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_clipping_keeps_gradients_that_are_not_finite_so(value: float) -> None:
    model, *_ = made()
    weight = model.projector[0].weight
    weight.grad = torch.ones_like(weight)
    weight.grad[0, 0] = value
    model.after_backward(Progress())
    assert not weight.grad.isfinite().all()


def test_settings_are_those_of_the_network() -> None:
    resnet, vit = make_config("dino"), make_config("dino", arch="vit_small")
    assert (resnet.optimisation.optimizer, resnet.optimisation.lr) == ("sgd", 0.03)
    assert resnet.optimisation.weight_decay_end is None
    assert (vit.views.recipe, vit.encoder.vit.vit_positions) == ("dino-vit", "learned")
    assert (vit.optimisation.optimizer, vit.optimisation.lr) == ("adamw", 5e-4)
    assert (vit.optimisation.weight_decay, vit.optimisation.weight_decay_end) == (0.04, 0.4)
    learned = build(small("dino", arch="vit_tiny", size=32, patch_size=2))  # small crops of 14 px
    views = sample(2, config=small("dino", size=32))
    loss, *_ = learned(views)
    loss.backward()
    assert learned.encoder.encoder.pos_embedding.grad.any()


@pytest.mark.parametrize("recipe", ["byol", "swav"])
def test_small_crops_are_as_many_as_the_recipe_has(recipe: str) -> None:
    config = small("dino", recipe=recipe)
    assert build(config)(sample(4, config=config)).loss.isfinite()
