"""What every method promises: steps, skipped steps, resume, ranks, precisions, presets, help."""

import copy
import pathlib
import re
from typing import Any

import pytest
import torch
from support.forks import on_ranks, succeed
from support.launch import equal
from support.steps import VARIANTS, build, make, sample, small, take

from fasttrain.config import make_config, parse_config
from fasttrain.engine.networks import make_networks
from fasttrain.engine.optim import Rates
from fasttrain.engine.ranks import Ranks
from fasttrain.engine.step import TrainStep
from fasttrain.jobs.train import seed_step
from fasttrain.methods import METHODS, Progress, Sample
from fasttrain.networks.recompute import stages
from fasttrain.presets import PRESETS
from fasttrain.system.errors import UserError
from fasttrain.system.options import flat

IMAGES = 16
CHANCE = 0.02  # of a gradient: sums in another order put one in a million activations on the other side of a ReLU
ALL = pytest.mark.parametrize("name", METHODS)
STEPS = pytest.mark.parametrize("name", [*METHODS, *VARIANTS])  # what is a step of its own


def batch_of(config: Any, number: int, epoch: float = 5.0) -> Sample:
    """Of the middle of a run, when nothing is frozen any more and every schedule moves."""
    return sample(IMAGES, number, config)._replace(progress=Progress(epoch + number / 10, 10.0))


def whole_state(method: Any, step: TrainStep) -> dict[str, Any]:
    return copy.deepcopy({"method": method.state_dict(), **step.state_dict()})


def steps_of(name: str, numbers: range, start: dict | None = None, **changes: Any) -> tuple[Any, TrainStep, list]:
    """A method after steps of these numbers, from a state or from the start, and the losses of the steps."""
    config = small(name, batch_size=IMAGES, **changes)
    method, step = make(name, batch_size=IMAGES, **changes)
    if start:
        method.load_state_dict(start["method"])
        step.load_state_dict(start)
    losses = []
    for number in numbers:
        seed_step(0, number, 0)
        losses.append(take(step, batch_of(config, number), number, 0.05)["loss"])
    return method, step, losses


@STEPS
def test_a_step_moves_all_that_is_trained_and_what_follows_it(name: str) -> None:
    fast = {"ema": 0.5} if "ema" in flat(small(name)) else {}  # else two steps may move an average by no digit
    start = build(small(name, batch_size=IMAGES))
    method, step, losses = steps_of(name, range(2), **fast)
    assert torch.stack(losses).isfinite().all()
    assert step.skips_3.tolist() == [0, 0, -1]
    before = dict(start.named_parameters())
    for place, p in method.named_parameters():  # what takes no gradient is an average of what does, or an anchor
        assert torch.equal(p, before[place]) == place.startswith("anchor_encoder."), place


@STEPS
def test_terms_are_curves(name: str) -> None:
    config = small(name, batch_size=IMAGES)
    loss, terms, carry, _ = build(config)(batch_of(config, 0))
    assert loss.dim() == 0
    assert loss.dtype == torch.float32
    assert all(term.dim() == 0 and not term.requires_grad for term in terms.values())
    assert not any(rows.requires_grad for rows in carry)
    assert "loss" not in terms


# What the loss of a contrast does not say. Of SupCon's several positives, which should be nearest is not said; the
# similarity of BYOL's and SimSiam's pairs is their loss, and SwAV's queue holds no negatives.
PAIRS = {"positive_similarity", "negative_similarity"}
OF_BATCH = {"contrastive_accuracy", *PAIRS}
OF_QUEUE = {*OF_BATCH, "queue_filled"}
CONTRAST = {
    **dict.fromkeys(("moco", "xmoco", "co2", "ressl", "sce", "nnclr", "cacr-queue", "hiclr"), OF_QUEUE),
    **dict.fromkeys(("mocov3", "simclr", "mv-infonce", "mv-dhel", "cacr", "bacon", "sepclr"), OF_BATCH),
    **dict.fromkeys(("supcon", "hydra"), PAIRS),
    "swav": {"queue_filled"},
}  # fmt: skip


@ALL
def test_a_contrast_tells_from_its_first_step_how_well_it_does(name: str) -> None:
    config = small(name, batch_size=IMAGES)
    method, step = make(name, batch_size=IMAGES)
    filled, keys = [], []
    for number in range(2):
        terms = take(step, batch_of(config, number), number, 0.05)
        assert terms.keys() & OF_QUEUE == CONTRAST.get(name, set())
        assert all(-1 <= terms[figure] <= 1 for figure in PAIRS & terms.keys())
        assert 0 <= terms.get("contrastive_accuracy", 0) <= 1
        if "queue_filled" in terms:
            filled.append(float(terms["queue_filled"]))
            keys.append(int(method.queue.pointer))
    assert filled == pytest.approx([0, keys[0] / len(method.queue.keys_KD)] if keys else [])


@ALL
def test_the_features_are_what_the_evaluated_encoder_makes_of_view_0(name: str) -> None:
    config = small(name, batch_size=IMAGES, batch_norm="plain")
    method, given = build(config), batch_of(config, 0)
    for network in method.evaluated:
        network.eval()  # so that all views of an image stand for themselves
    features_NF = method(given).features_NF
    assert not features_NF.requires_grad
    assert torch.allclose(features_NF, method.evaluated[0](given.views[0][0]), atol=1e-5)


@STEPS
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    config = small(name, batch_size=IMAGES)
    method, step, _ = steps_of(name, range(2))
    before = whole_state(method, step)
    bad = batch_of(config, 2)
    bad.views[0][0, 0, 0, 0, 0] = torch.nan
    take(step, bad, 2, 0.05)
    after = whole_state(method, step)
    assert after.pop("skips").tolist() == [1, 1, 2]
    del before["skips"]
    assert equal(before, after) == []


@STEPS
def test_a_run_that_was_saved_goes_on_to_the_bit(name: str) -> None:
    whole = steps_of(name, range(4))
    half = steps_of(name, range(2))
    again = steps_of(name, range(2, 4), whole_state(*half[:2]))
    assert equal(whole_state(*whole[:2]), whole_state(*again[:2])) == []
    assert torch.equal(torch.stack(whole[2][2:]), torch.stack(again[2]))


@STEPS
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_in_less_precision_are_finite(name: str, precision: str) -> None:
    _method, step, losses = steps_of(name, range(3), precision=precision)
    assert torch.stack(losses).isfinite().all()
    assert step.skips_3.tolist()[0] == 0


def _steps_on_ranks(folder: pathlib.Path, name: str, epoch: float = 5.0) -> None:
    """Two steps of this rank's share of the images. Batch norm is over all ranks, which is what the method is held to;
    the share of rank r are the images r·N/W and on."""
    ranks = Ranks("cpu")
    config = small(name, batch_size=IMAGES, batch_norm="sync")
    method, step = make(name, batch_size=IMAGES, batch_norm="sync")
    count = IMAGES // ranks.world_size
    rows = slice(ranks.rank * count, (ranks.rank + 1) * count)
    terms, gradients = [], {}
    for number in range(2):
        whole = batch_of(config, number, epoch)
        views = tuple(_rows(group, rows) for group in whole.views)
        label_B = None if whole.label_B is None else whole.label_B[rows]
        seed_step(0, number, 0)
        given = step.forward_backward(whole._replace(views=views, label_B=label_B, index_B=whole.index_B[rows]))
        terms.append({key: float(value) for key, value in ranks.mean(given).items()})
        if number == 0:
            gradients = {place: p.grad.clone() for place, p in method.named_parameters() if p.grad is not None}
        # by a tenth of the weights, or so; Adam moves all numbers by the rate, where a gradient is rounding, too
        rate = 0.0003 if config.optimisation.optimizer == "adamw" else 0.003
        step.update(number, Rates(rate, rate, config.optimisation.weight_decay))
    torch.save((terms, gradients, method.state_dict()), folder / f"rank{ranks.rank}.pt")
    ranks.close()


def _rows(group: torch.Tensor, rows: slice) -> torch.Tensor:
    return group.permute(0, 1, 3, 4, 2)[:, rows].contiguous().permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize(
    ("name", "world_size"), [*((name, 2) for name in [*METHODS, *VARIANTS]), *((name, 4) for name in METHODS)]
)
def test_on_several_ranks_a_step_is_that_of_one(tmp_path: pathlib.Path, name: str, world_size: int) -> None:
    _compare_ranks(tmp_path, name, world_size)


@pytest.mark.parametrize("name", [name for name in METHODS if "freeze_epochs" in flat(make_config(name))])
def test_on_several_ranks_frozen_prototypes_stay_and_all_else_moves_alike(tmp_path: pathlib.Path, name: str) -> None:
    """Gradients that are dropped after DDP has summed them up."""
    state = _compare_ranks(tmp_path, name, 2, epoch=0.0)
    torch.testing.assert_close(state["prototypes.weight"], build(small(name)).prototypes.weight)
    assert not torch.equal(state["projector.0.weight"], build(small(name)).projector[0].weight)


def _compare_ranks(tmp_path: pathlib.Path, name: str, world_size: int, epoch: float = 5.0) -> dict[str, torch.Tensor]:
    """Holds two steps on several ranks to those on one, whose state it returns."""
    succeed(on_ranks(tmp_path, 1, _steps_on_ranks, tmp_path, name, epoch))
    expected = torch.load(tmp_path / "rank0.pt")
    succeed(on_ranks(tmp_path, world_size, _steps_on_ranks, tmp_path, name, epoch))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    for terms, gradients, state in found:
        # the second step has what CHANCE made of the weights; a queue that is not the same would tell by more
        for ours, theirs, near in zip(terms, expected[0], (1e-5, 1e-3), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=near)
        assert gradients.keys() == expected[1].keys()
        for place, gradient in expected[1].items():
            # what a batch norm takes off again has a gradient of 0, but for rounding
            assert (gradients[place] - gradient).norm() <= CHANCE * gradient.norm() + 1e-6, place
        for place, value in expected[2].items():
            if not place.endswith("num_batches_tracked"):
                assert (state[place] - value).double().norm() <= CHANCE * value.double().norm() + 1e-3, place
    return expected[2]


@ALL
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_run(name: str, preset: str) -> None:
    for arch in ({}, {"arch": "vit_small"}):
        config = make_config(name, preset, **arch)
        assert config.optimisation.peak_lr < 20
        assert config.optimisation.warmup_epochs < config.optimisation.epochs


@ALL
def test_settings_are_of_options_that_there_are(name: str) -> None:
    """A preset's value under a name that nothing has would be passed over."""
    options = METHODS[name]
    for arch in ("", "vit_small"):
        known = flat(make_config(name, **({"arch": arch} if arch else {})))
        for values in (options.paper, options.paper_vit, *options.presets.values()):
            assert set(values) <= set(known)
    assert set(options.presets) <= set(PRESETS)
    assert {"imagenet100", "stl10", "cifar10", "demo"} <= set(options.presets)


@ALL
def test_help_explains_the_method_with_its_paper(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--method", name, "--help"])
    assert stop.value.code == 0
    text = " ".join(re.sub("[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    explained = " ".join((METHODS[name].__doc__ or "").split())
    assert explained in text
    assert re.search(r"arXiv \d{4}\.\d{5}", explained)
    assert explained.count(". ") + 1 >= 2


@ALL
def test_micro_batches_are_refused_where_they_would_part_the_loss(name: str) -> None:
    compared = {
        "mocov3", "simclr", "nnclr", "barlow", "vicreg", "swav", "supcon", "mv-infonce", "mv-dhel", "cacr",
        "hydra", "bacon", "sepclr",
    }  # fmt: skip
    assert METHODS[name].over_batch == (name in compared)
    if name in compared:
        with pytest.raises(UserError, match=f"--accumulate 2: the loss of --method {name} compares the images"):
            small(name, accumulate=2)
    else:
        _method, step, losses = steps_of(name, range(2), accumulate=2)
        assert torch.stack(losses).isfinite().all()
        assert step.skips_3.tolist()[0] == 0


@ALL
def test_networks_are_compiled_each_by_itself(name: str) -> None:
    """What holds parameters is a direct child, and nothing is a parameter of the method itself."""
    method = build(small(name))
    assert dict(method.named_parameters(recurse=False)) == {}
    assert stages(method.encoder)
    assert all(isinstance(network, torch.nn.Module) for network in method.evaluated)


# On a GPU

GPU = torch.device("cuda")


def steps_on_a_gpu(name: str, **changes: Any) -> tuple[TrainStep, list[Sample]]:
    """The step of a method there, and its batches."""
    torch._dynamo.reset()
    config = small(name, batch_size=IMAGES, **changes)
    parts = config.method, config.encoder, config.views, config.optimisation, config.machine
    step = TrainStep(make_networks(*parts, GPU, 0), config.optimisation, GPU, config.machine.cuda_graph)
    batches = []
    for number in range(4):
        views, label_B, *rest = batch_of(config, number)
        on_gpu = tuple(group.to(GPU) for group in views), None if label_B is None else label_B.to(GPU)
        batches.append(Sample(*on_gpu, *rest))
    return step, batches


@pytest.mark.gpu
@STEPS
def test_no_method_has_the_host_wait_for_the_gpu(name: str) -> None:
    step, batches = steps_on_a_gpu(name, compile="off", precision="bf16")
    for number in range(3):  # the first ones compile kernels
        if number == 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            take(step, batches[number], number, 0.05)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("cuda_graph", [False, True])
@STEPS
def test_compiled_and_replayed_steps_are_those_of_eager_torch(name: str, cuda_graph: bool) -> None:
    """Of networks that a step calls twice and at several sizes, too: no replay may write over what is still needed."""
    found = []
    for changes in ({"compile": "off"}, {"compile": "on", "cuda_graph": cuda_graph}):
        step, batches = steps_on_a_gpu(name, **changes)
        losses = []
        for number, batch in enumerate(batches):
            seed_step(0, number, 0)
            losses.append(take(step, batch, number, 0.01)["loss"].clone())
        found.append(torch.stack(losses))
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)
