"""The training step: what its options may change and what not, and steps that must change nothing."""

import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.forks import on_ranks, succeed
from support.launch import equal, final_state, train
from support.steps import build, make, make_without_norm, sample, small, take
from torch import nn

from fasttrain.engine import skips as skips_module
from fasttrain.engine.networks import compile_networks, laid_out, make_networks
from fasttrain.engine.options import MachineOptions
from fasttrain.engine.precision import DTYPES
from fasttrain.engine.ranks import Ranks
from fasttrain.engine.step import TrainStep
from fasttrain.input import open_dataset
from fasttrain.jobs.train import seed_step
from fasttrain.kernels.augment import augment
from fasttrain.methods import Method, Sample
from fasttrain.networks import batch_norm
from fasttrain.run.health import Health
from fasttrain.run.metrics import REPLACED, Metrics, MetricsFile, read_metrics
from fasttrain.system.errors import UserError
from fasttrain.views.draw import draw
from fasttrain.views.spec import RECIPES

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def whole_state(method: Method, step: TrainStep) -> dict[str, Any]:
    """Copies of everything a step may change."""
    state = {name: v.clone() for name, v in method.state_dict().items()}
    optimizer = step.optimizer.state_dict()
    return {"method": state, "optimizer": {i: dict(s) for i, s in optimizer["state"].items()}}


def snapshot(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


# Every set of options goes on exactly where it stopped


@pytest.mark.parametrize(
    "options",
    [
        "--optimizer lars --lr 5 --clip-norm 1",
        "--optimizer adamw --precision fp16 --accumulate 2 --epochs 2",
        "--optimizer lamb --epochs 2",
        "--method moco --batch-norm plain --checkpoint-activations --resolution 8:24 --size 24 --knn-every 1",
    ],
)
def test_resume_is_bit_identical(shards: pathlib.Path, tmp_path: pathlib.Path, options: str) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(shards, whole, *options.split()) == 0
    stop = random.randrange(1, final_state(whole)["step"])
    assert train(shards, run, *options.split(), "--max-steps", stop) == 0
    assert train(shards, run, *options.split()) == 0
    assert equal(final_state(whole), final_state(run)) == [], f"stopped at {stop}"


def test_recomputed_activations_end_with_the_same_weights(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name, more in (("with", ["--checkpoint-activations"]), ("without", [])):
        assert train(shards, tmp_path / name, "--max-steps", 6, *more) == 0
    assert equal(final_state(tmp_path / "with"), final_state(tmp_path / "without")) == []


# Micro-batches and clipping


# Losses of three steps, of methods without batch statistics, before a method named its loss terms: the same now.
AS_BEFORE = [
    ({"method": "moco"}, [1.664846658706665, 2.654585838317871, 3.1751232147216797]),
    (
        {"method": "moco", "cross": "batch", "cross_weight": 1.0, "uniform": "batch"},
        [1.7449328899383545, 2.8330633640289307, 3.240865468978882],
    ),
    (
        {"method": "moco", "cross": "queue", "uniform": "queue"},
        [2.6563825607299805, 3.2253990173339844, 3.5906758308410645],
    ),
    ({"method": "moco", "decoupled": True}, [1.3999892473220825, 2.558432102203369, 3.090754985809326]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), AS_BEFORE)
def test_losses_of_steps_are_what_they_were(options: dict[str, Any], expected: list[float]) -> None:
    _method, step = make(batch_norm="plain", **options)
    losses = []
    for number in range(3):
        torch.manual_seed(number)
        losses.append(float(take(step, sample(8, number), number, 0.05)["loss"]))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_micro_batches_add_up_to_the_batch() -> None:
    outcomes = []
    for parts in (1, 2, 4):
        method, step = make_without_norm(accumulate=parts)
        terms = [take(step, sample(8, n), n, 0.1)["loss"] for n in range(3)]
        outcomes.append((torch.stack(terms), *method.state_dict().values()))
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_that_can_t_be_cut_is_refused(
    shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, tmp_path / "run", "--accumulate", 3) == 2
    assert "--batch-size 16 can't be cut into 3 equal parts (--accumulate)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_at_their_true_size(precision: str) -> None:
    """SGD's first step moves the weights by lr times the gradient, whatever factor the loss was scaled by."""
    lengths = {}
    for clip_norm in (0.0, 1e-3, 1e3):
        method, step = make_without_norm(clip_norm=clip_norm, precision=precision, weight_decay=0.0)
        before = nn.utils.parameters_to_vector(method.encoder.parameters()).detach().clone(), method.projector
        start = torch.cat([before[0], nn.utils.parameters_to_vector(before[1].parameters()).detach()])
        take(step, sample(), 0, 1.0)
        end = nn.utils.parameters_to_vector([*method.encoder.parameters(), *method.projector.parameters()])
        lengths[clip_norm] = float((end - start).norm().detach())
    assert lengths[0.0] > 0.01
    assert lengths[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert lengths[1e3] == pytest.approx(lengths[0.0], rel=1e-3)


# Steps whose gradients are not finite


@pytest.mark.parametrize("bad_first", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_norm": "split"}, {"batch_norm": "plain", "optimizer": "adamw"}, {"optimizer": "lars", "accumulate": 2},
        {"precision": "fp16", "clip_norm": 1.0}, {"precision": "bf16", "method": "xmoco"}, {"optimizer": "lamb"},
    ],
)  # fmt: skip
def test_a_bad_step_changes_nothing(changes: dict[str, Any], bad_first: bool) -> None:
    """Every weight, statistic and key stays to the bit, and the step after it is as if it had not been."""
    method, step = make(**changes)
    twin, twin_step = make(**changes)
    if not bad_first:
        for m in (step, twin_step):
            seed_step(0, 1, 0)
            take(m, sample(), 0, 0.1)
    before = snapshot(method.state_dict())
    bad = sample(seed=1)
    bad.views[0][1, 3, 0, 2, 2] = float("nan") if bad_first else float("inf")
    take(step, bad, 5, 0.1)
    assert equal(snapshot(method.state_dict()), before) == []
    assert step.skips_3.tolist() == [1, 1, 5]
    if "precision" not in changes:  # the scale of fp16 rightly differs
        for m in (step, twin_step):
            seed_step(0, 2, 0)
            take(m, sample(seed=2), 6, 0.1)
        assert equal(whole_state(method, step), whole_state(twin, twin_step)) == []
        assert step.skips_3.tolist() == [1, 0, 5]


def test_fp16_halves_its_scale_and_goes_on() -> None:
    method, step = make_without_norm(precision="fp16")
    step._scaler.load_state_dict({**step._scaler.state_dict(), "scale": 2.0**40})  # every gradient overflows at first
    weight = next(method.encoder.parameters())
    before = weight.detach().clone()
    number = 0
    while torch.equal(weight, before):
        take(step, sample(), number, 0.1)
        number += 1
        assert number < 40
    total, in_a_row, last = step.skips_3.tolist()
    assert (total, in_a_row, last) == (number - 1, 0, number - 2)
    assert step._scaler.state_dict()["scale"] == 2.0 ** (40 - total)


def _bad_on_one_rank(folder: pathlib.Path) -> None:
    ranks = Ranks("cpu")
    rank = ranks.rank
    method, step = make_without_norm(accumulate=2)
    states = [snapshot(method.state_dict())]
    for number in range(4):
        rows = slice(4 * rank, 4 * rank + 4)
        whole = sample(8, number)
        batch = Sample((whole.views[0][:, rows].clone(),), None, whole.index_B[rows])
        if number == 2 and rank == 1:
            batch.views[0][:, 0] = float("nan")
        take(step, batch, number, 0.1)
        states.append(snapshot(method.state_dict()))
    torch.save((states, step.skips_3.tolist()), folder / f"rank{rank}.pt")
    ranks.close()


def test_ranks_accumulate_as_one_process_does_and_skip_together(tmp_path: pathlib.Path) -> None:
    succeed(on_ranks(tmp_path, 2, _bad_on_one_rank, tmp_path))
    (states, skips), other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert equal((states, skips), other) == []
    assert skips == [1, 0, 2]
    assert equal(states[3], states[2]) == []
    assert equal(states[2], states[1]) != []
    assert equal(states[4], states[3]) != []
    # One process over the same batches. A rank's micro-batches lie apart in it, so the queue's order differs.
    method, step = make_without_norm()
    for number in (0, 1):
        take(step, sample(8, number), number, 0.1)
    for name, value in method.state_dict().items():
        if not name.startswith("queue"):
            torch.testing.assert_close(states[2][name], value, rtol=1e-4, atol=1e-6)


@pytest.fixture
def nan_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Views that hold a NaN at some steps of a run."""
    from fasttrain.engine import views as module

    def damage(steps: set[int]) -> None:
        calls, augment = iter(range(10_000)), module.augment

        def damaged(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
            out = augment(*arguments, **options)
            if next(calls) in steps:
                out[0][0, 0, 0, 0, 0] = float("nan")
            return out

        monkeypatch.setattr(module, "augment", damaged)

    return damage


def test_a_run_goes_on_after_a_bad_step(
    shards: pathlib.Path, tmp_path: pathlib.Path, nan_at: Callable[[set[int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    nan_at({5, 8, 9})
    run = tmp_path / "run"
    assert train(shards, run) == 0
    entries = read_metrics(run / "metrics.jsonl")
    assert [entry["skipped"] for entry in entries] == [0, 0, 1, 1, 3, 3, 3, 3]
    assert [entry["step"] for entry in entries if entry["loss"] is None] == [10]  # both its steps were skipped
    assert "3 steps skipped" in capsys.readouterr().err
    assert final_state(run)["skips"].tolist() == [3, 0, 9]
    assert "steps skipped" in (run / "report.html").read_text()
    state = final_state(run)
    assert all(value.isfinite().all() for value in state["method"].values())


def test_too_many_bad_steps_end_the_run(
    shards: pathlib.Path,
    tmp_path: pathlib.Path,
    nan_at: Callable[[set[int]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the step, the samples and the last checkpoint from before them, which none written meanwhile pushes out."""
    monkeypatch.setattr(skips_module, "MAX_SKIPPED", 5)
    nan_at(set(range(6, 1000)))
    run = tmp_path / "run"
    assert train(shards, run, "--checkpoint-every", 1, "--keep-last", 2, "--log-every", 1) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if ": error: " in line)
    assert "not finite in 5 of 11 steps, 5 in a row, the last at step 11 with samples" in error
    assert "step-000000006.pt" in error
    record = json.loads((run / "not-finite.json").read_text())
    assert (record["step"], record["epoch"], len(set(record["samples"]))) == (11, 2, 16)
    assert str(record["samples"][0]) in error
    assert record["names"] == [open_dataset(shards, "train").name(sample) for sample in record["samples"]]
    assert final_state(run)["step"] == 6


# Compiling


def test_compile_in_place_keeps_the_names_of_a_method_s_state(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build(small())
    names, compiled = list(method.state_dict()), []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    compile_networks(method, MachineOptions(compile="on"), torch.device("cpu"), 1)
    assert list(method.state_dict()) == names
    assert [m for m, _ in compiled] == [method.encoder, method.projector, method.key_encoder, method.key_projector]
    compiled.clear()
    compile_networks(method, MachineOptions(), torch.device("cpu"), 1)
    assert not compiled


def test_cuda_graph_is_refused_where_batch_norm_is_synchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's exchanges in a replayed graph: nobody has tried."""
    monkeypatch.setattr(batch_norm, "world_size", lambda: 2)
    method, machine = build(small(batch_norm="sync")), MachineOptions(cuda_graph=True, compile="on")
    with pytest.raises(UserError, match="--cuda-graph can't replay what --batch-norm sync or machine exchanges"):
        compile_networks(method, machine, torch.device("cuda"), 1)


def test_cuda_graph_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="--cuda-graph needs a GPU"):
        compile_networks(build(small()), MachineOptions(cuda_graph=True), torch.device("cpu"), 1)


def test_compile_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        compile_networks(build(small()), MachineOptions(compile="on"), torch.device("cpu"), 1)


@pytest.mark.slow
def test_a_compiled_run_can_be_continued_without_compiling(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--compile", "on", "--max-steps", 3) == 0
    assert train(shards, run, "--compile", "off", "--max-steps", 6) == 0
    assert final_state(run)["step"] == 6
    assert not any("_orig_mod" in name for name in final_state(run)["method"])


def five_steps(
    device: str, **changes: Any
) -> tuple[torch.Tensor, list[int], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, skipped steps, the state before and after five steps of which one has a NaN in its views."""
    torch._dynamo.reset()
    config = small("xmoco", batch_size=64, ema=0.9, **changes)
    ranks = Ranks(device)
    method = make_networks(
        config.method, config.encoder, config.views, config.optimisation, config.machine, ranks.device, 0
    )
    step, losses = TrainStep(method, config.optimisation, ranks.device, config.machine.cuda_graph), []
    before = {name: value.cpu().clone() for name, value in method.state_dict().items()}
    for number in range(5):
        batch = torch.randn(2, 64, 16, 16, 3, generator=torch.Generator().manual_seed(number)).permute(0, 1, 4, 2, 3)
        batch[0, 0, 0, 0, 0] = torch.nan if number == 2 else 0.0
        given = Sample((batch.to(ranks.device),), None, torch.arange(64))
        seed_step(0, number, 0)
        losses.append(take(step, given, number, 0.05)["loss"].clone())
    return (
        torch.stack(losses).cpu(),
        step.skips_3.tolist(),
        before,
        {n: v.cpu() for n, v in method.state_dict().items()},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "precision", "options"),
    [
        pytest.param("cpu", "fp32", {"compile": "on"}, marks=NEEDS_COMPILER),
        pytest.param("cuda", "fp32", {"compile": "on"}, marks=pytest.mark.gpu),
        pytest.param("cuda", "bf16", {"compile": "on"}, marks=pytest.mark.gpu),
        pytest.param("cuda", "fp32", {"cuda_graph": True}, marks=pytest.mark.gpu),
        pytest.param("cuda", "bf16", {"cuda_graph": True}, marks=pytest.mark.gpu),
    ],
)
def test_compiled_steps_are_those_of_eager_torch(device: str, precision: str, options: dict[str, Any]) -> None:
    expected, skips, before, eager = five_steps(device, precision=precision, compile="off")
    losses, compiled_skips, same, compiled = five_steps(device, precision=precision, **options)
    assert compiled_skips == skips == [1, 0, 2]
    tolerance, part = (0.02, 0.3) if precision == "bf16" else (2e-3, 0.05)  # of a loss; of what the steps changed
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert losses[[0, 1, 3, 4]].isfinite().all()
    assert equal(before, same) == []
    assert compiled["queue.pointer"] == eager["queue.pointer"] == 4 * 64 % 40
    for name in eager:
        first, one, other = (state[name].double() for state in (before, eager, compiled))
        assert (other - one).norm() <= part * (one - first).norm(), name


@pytest.mark.gpu
def test_a_run_goes_on_on_another_device(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Queue, momentum and loss scale move; the queue is kept in 16 bits on a GPU only."""
    run = tmp_path / "run"
    for steps, device in ((4, "cuda"), (8, "cpu"), (16, "cuda")):
        assert train(shards, run, "--device", device, "--max-steps", steps) == 0
        assert final_state(run)["step"] == steps
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")] == list(range(2, 17, 2))
    assert all(value.isfinite().all() for value in final_state(run)["method"].values())


# No wait for the device


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw", "lamb"])
def test_a_step_never_waits_for_the_gpu(tmp_path: pathlib.Path, optimizer: str, precision: str) -> None:
    """Nor do the making of its views and the log, an entry for every step."""
    config = small("xmoco", optimizer=optimizer, precision=precision, clip_norm=1.0)
    ranks = Ranks("cuda")
    method = laid_out(build(config), ranks.device, precision)
    step = TrainStep(method, config.optimisation, ranks.device)
    metrics = Metrics((MetricsFile(tmp_path / "metrics.jsonl", 0),), Health(ranks.device, 1), ranks.device, 1, 8)
    sizes = torch.full((8,), 20, dtype=torch.int32), torch.full((8,), 24, dtype=torch.int32)
    index = torch.arange(8)
    pixels = torch.randint(0, 256, (8 * 20 * 24 * 3,), dtype=torch.uint8, device=ranks.device)

    def whole_step(number: int) -> None:
        with metrics.making_views():
            table = draw(RECIPES["mocov2"], *sizes, index, 0, number, 16)
            views = augment(pixels, index * 20 * 24 * 3, *sizes, table, (16, 16), *STATISTICS, dtype=DTYPES[precision])
        terms = take(step, Sample(views, None, index), number, 0.1)
        replaced = torch.full_like(terms["loss"], number, dtype=torch.float32)
        metrics.step(number + 1, 0, 0.1, {**terms, REPLACED: replaced}, step.skips_3)

    for number in range(2):  # compile kernels
        whole_step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole_step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    metrics.flush(3, 0, 0.1)
    metrics.close()
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
