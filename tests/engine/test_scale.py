"""The same training on one process and on many: losses, weights, sample order, cores."""

import datetime
import inspect
import json
import os
import pathlib
import time
from collections.abc import Callable

import pytest
import torch
from support.commands import CORES
from support.forks import on_ranks, succeed
from support.launch import final_state, train, train_on_ranks
from torch import nn

from fasttrain.engine import ranks as dist
from fasttrain.engine.ranks import Ranks, data_parallel
from fasttrain.networks.batch_norm import convert_batch_norm
from fasttrain.run.metrics import read_metrics
from fasttrain.system.cores import share_of
from fasttrain.system.errors import UserError

# Batch statistics are the one thing that depends on how many images a process holds, so this encoder has none, and
# arithmetic is in fp32. What is left is the order in which floating-point sums are taken, which a large weight of the
# consistency makes tenfold in six steps.
EXACT = [
    "--arch", "squeezenet1_1", "--size", "32", "--batch-norm", "plain", "--precision", "fp32", "--log-every", "1",
    "--cross-weight", "1",
]  # fmt: skip
STEPS = 6
TOLERANCE = 1e-5  # of a loss of 3 to 5, after up to STEPS steps; 1e-6 was seen


def losses(run: pathlib.Path) -> torch.Tensor:
    entries = read_metrics(run / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    return torch.tensor([[v for k, v in e.items() if k in ("loss", "contrast", "cross", "uniform")] for e in entries])


def exactly(folder: pathlib.Path, count: int, shards: pathlib.Path, run: pathlib.Path, *more: object) -> str:
    """Train on so many ranks; returns what they wrote to stderr."""
    ended = train_on_ranks(folder, count, shards, run, *EXACT, "--device", "cpu", *more)
    succeed(ended)
    return "".join(rank.stderr for rank in ended)


@pytest.fixture(scope="module")
def one_rank(shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("one") / "run"
    assert train(shards, run, *EXACT, "--max-steps", STEPS) == 0
    return run


def test_two_ranks_have_the_losses_of_one(one_rank: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    exactly(tmp_path, 2, shards, tmp_path / "run", "--max-steps", STEPS)
    assert torch.allclose(losses(tmp_path / "run"), losses(one_rank), rtol=0, atol=TOLERANCE)
    # a wrong share of the batch, or a queue filled in another order, would be far outside
    other = tmp_path / "other"
    assert train(shards, other, *EXACT, "--max-steps", STEPS, "--seed", 1) == 0
    assert (losses(other) - losses(one_rank)).abs().max() > 500 * TOLERANCE


def test_a_run_goes_on_with_another_number_of_ranks(
    one_rank: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Four ranks, then one: the samples, the queue and the losses are those of one rank all the way."""
    run = tmp_path / "run"
    errors = exactly(tmp_path, 4, shards, run, "--max-steps", STEPS // 2)
    assert "Warning" not in errors
    assert train(shards, run, *EXACT, "--max-steps", STEPS) == 0
    assert torch.allclose(losses(run), losses(one_rank), rtol=0, atol=TOLERANCE)
    ours, theirs = final_state(run), final_state(one_rank)
    assert ours["loader"] == theirs["loader"]
    for name, value in theirs["method"].items():
        assert torch.allclose(ours["method"][name].float(), value.float(), rtol=0, atol=TOLERANCE), name


def test_synchronised_batch_norm_has_the_losses_of_one_rank(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A network with batch norm: statistics over all ranks, here of a machine, are those of one with the batch."""
    network = ["--arch", "small", "--max-steps", STEPS]
    assert train(shards, tmp_path / "one", *EXACT, *network) == 0
    for kind in ("sync", "machine", "plain"):
        exactly(tmp_path, 2, shards, tmp_path / kind, *network, "--batch-norm", kind)
    expected = losses(tmp_path / "one")
    apart = {kind: (losses(tmp_path / kind) - expected).abs().max().item() for kind in ("sync", "machine", "plain")}
    # batch norm of a few rows divides rounding by small deviations
    assert max(apart["sync"], apart["machine"]) < 1e-3, apart
    assert apart["plain"] > 10 * apart["sync"], apart


@pytest.mark.slow
def test_split_batch_norm_has_the_losses_of_one_rank(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Its groups, and who is in them with whom, are counted over all ranks."""
    network = ["--arch", "small", "--max-steps", STEPS, "--batch-norm", "split"]
    assert train(shards, tmp_path / "one", *EXACT, *network) == 0
    exactly(tmp_path, 2, shards, tmp_path / "two", *network)
    assert torch.allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-3)


def on_machines(size: int) -> None:
    """The ranks are those of machines of so many each, as torchrun numbers them."""
    os.environ.update(LOCAL_WORLD_SIZE=str(size), LOCAL_RANK=str(int(os.environ["RANK"]) % size))


def _synchronised(folder: pathlib.Path, kind: str = "sync", machine: int = 1) -> None:
    on_machines(machine)
    ranks = Ranks("cpu")
    torch.manual_seed(0)
    images = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()
    network = nn.Sequential(*images, nn.Flatten(), nn.Linear(80, 6), nn.BatchNorm1d(6))
    nn.init.uniform_(network[1].weight)
    nn.init.uniform_(network[1].bias)
    x, target = torch.randn(12, 3, 6, 6) * 3 + 1, torch.randn(12, 6)
    network = convert_batch_norm(network, kind)
    own = slice(ranks.rank * 12 // ranks.world_size, (ranks.rank + 1) * 12 // ranks.world_size)
    x_own = x[own].clone().requires_grad_()
    parallel = data_parallel(network, True)
    loss = (parallel(x_own) - target[own]).square().mean()
    loss.backward()
    found = {"x": x_own.grad / ranks.world_size, **{n: p.grad for n, p in network.named_parameters()}}
    found |= {n: b for n, b in network.named_buffers() if "running" in n}
    found["eval"] = network.eval()(x).detach()
    torch.save(found, folder / f"{ranks.world_size}-{ranks.rank}.pt")
    ranks.close()


def test_synchronised_batch_norm_is_batch_norm_of_the_whole_batch(tmp_path: pathlib.Path) -> None:
    """Values, gradients and running statistics of two ranks are those of one."""
    for count in (1, 2):
        succeed(on_ranks(tmp_path, count, _synchronised, tmp_path))
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    first["x"] = torch.cat([first["x"], second["x"]])
    assert one.keys() == first.keys()
    for name, value in one.items():
        assert torch.allclose(first[name], value, rtol=1e-4, atol=1e-6), name


def test_batch_norm_of_a_machine_is_that_of_one_rank_with_all_its_images(tmp_path: pathlib.Path) -> None:
    """Values, gradients and running statistics of two machines of two ranks are those of two ranks."""
    succeed(on_ranks(tmp_path, 2, _synchronised, tmp_path, "plain"))
    succeed(on_ranks(tmp_path, 4, _synchronised, tmp_path, "machine", 2))
    for machine in range(2):
        one = torch.load(tmp_path / f"2-{machine}.pt")
        first, second = (torch.load(tmp_path / f"4-{2 * machine + place}.pt") for place in range(2))
        first["x"] = torch.cat([first["x"], second["x"]])
        assert one.keys() == first.keys()
        for name, value in one.items():
            assert torch.allclose(first[name], value, rtol=1e-4, atol=1e-6), name


def _refused(variables_W: list[dict[str, str | None]], reason: str) -> None:
    for name, value in variables_W[int(os.environ["RANK"])].items():
        os.environ.pop(name)
        if value:
            os.environ[name] = value
    ranks = Ranks("cpu")
    with pytest.raises(UserError, match=reason):
        convert_batch_norm(nn.Sequential(nn.BatchNorm2d(5)), "machine")
    ranks.close()


@pytest.mark.parametrize(
    ("variables_W", "reason"),
    [
        ([{"LOCAL_WORLD_SIZE": "1"}, {}], r"not equally many on each machine: \[1, 2\]"),
        ([{"LOCAL_RANK": "1"}, {"LOCAL_RANK": "0"}], "not numbered in a row"),
        ([{"LOCAL_WORLD_SIZE": None}, {"LOCAL_WORLD_SIZE": None}], "do not say which processes are of one machine"),
    ],
    ids=["unequal", "dealt out in turn", "unknown"],
)
def test_batch_norm_of_machines_is_refused_where_it_is_not_known_which_ranks_they_have(
    variables_W: list[dict[str, str | None]], reason: str, tmp_path: pathlib.Path
) -> None:
    succeed(on_ranks(tmp_path, 2, _refused, variables_W, reason))


@pytest.mark.parametrize("name", ["forward_sync_buffers", "broadcast_buffers"])
def test_buffers_are_not_sent_in_a_step_under_either_name_of_that_option(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """torch 2.13 renamed it; with neither, DDP would send the queue at every step."""
    given = {}

    class Parallel(torch.nn.Module):
        def __init__(
            self, module: nn.Module, gradient_as_bucket_view: bool, static_graph: bool, **options: object
        ) -> None:
            given.update(options)

    place = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    monkeypatch.setattr(Parallel.__init__, "__signature__", inspect.Signature([place]), raising=False)
    monkeypatch.setattr(dist, "DistributedDataParallel", Parallel)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    dist.data_parallel(torch.nn.Linear(1, 1), static_graph=True)
    assert given == {name: False}


def _tell_cores(folder: pathlib.Path, cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    ranks = Ranks("cpu")
    told = ranks.cores, sorted(os.sched_getaffinity(0))
    (folder / f"{ranks.rank}.json").write_text(json.dumps(told))
    ranks.close()


@pytest.mark.skipif(len(CORES) < 2, reason="needs two hardware threads")
def test_ranks_of_a_machine_keep_to_their_own_cores(tmp_path: pathlib.Path) -> None:
    succeed(on_ranks(tmp_path, 2, _tell_cores, tmp_path, CORES))
    shares = [share_of(CORES, place, 2) for place in range(2)]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told == [[len(share), sorted(share)] for share in shares]


def _be_busy() -> None:
    dist.SIGN_OF_LIFE_SECONDS = 0.5
    ranks = Ranks("cpu")  # which may take its time to find the other
    ranks._control = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(seconds=5))

    def work(still_here: Callable[[], object]) -> tuple[int, str]:
        for _ in range(65):
            time.sleep(0.1)
            still_here()
        return ranks.rank, "done"

    assert ranks.of_first(work if ranks.is_main else None) == (0, "done")
    ranks.close()


def test_ranks_wait_for_a_busy_one_longer_than_for_one_they_hear_nothing_of(tmp_path: pathlib.Path) -> None:
    """An evaluation on the first rank may take longer than the time after which a rank counts as lost."""
    succeed(on_ranks(tmp_path, 2, _be_busy))
