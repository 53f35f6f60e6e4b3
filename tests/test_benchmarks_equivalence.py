"""The benchmark of equivalence: its plain loop sees and learns what a run of fasttrain does."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from support.launch import final_state
from torch import Tensor

from benchmarks import equivalence, record
from benchmarks.equivalence import EquivalenceBenchmark
from benchmarks.equivalence_sides import PlainSide
from fasttrain.config import TrainConfig, parse_config
from fasttrain.engine.ranks import Ranks, given_back
from fasttrain.jobs import train as training
from fasttrain.run.metrics import read_metrics
from fasttrain.system.errors import UserError

STEPS = 8  # two epochs
TRAINED = "encoder.", "projector."
EXACT = (
    "--arch small --size 16 --batch-size 16 --queue-size 64 --dim 16 --lr 0.16 --weight-decay 1 --warmup-epochs 1 "
    "--precision fp32 --compile off --device cpu --log-every 1"
)


def of_data(data: pathlib.Path, runs: pathlib.Path, more: str = "", **values: Any) -> EquivalenceBenchmark:
    given = {"seeds": (3,), "epochs": 2, "knn_every": 1, **values}
    return EquivalenceBenchmark(str(data), f"{EXACT} {more}", runs=str(runs), **given)


class Seen(NamedTuple):
    """What a run's steps have: their views (2, B, 3, S, S) and losses; and what it ends with."""

    config: TrainConfig
    views: list[Tensor]
    losses: list[float]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def run(shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    config = parse_config(equivalence.words_of(of_data(shards, tmp_path_factory.mktemp("runs")), 3))
    views: list[Tensor] = []
    make: Callable[..., tuple[Tensor, ...]] = training.make_views

    def seen(*inputs: Any, **options: Any) -> tuple[Tensor, ...]:
        made = make(*inputs, **options)
        views.append(made[0].clone())
        return made

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training, "make_views", seen)
        folder = training.train(config).run
    losses = [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]
    return Seen(config, views, losses, final_state(folder)["method"])


@contextlib.contextmanager
def plain_side(config: TrainConfig) -> Iterator[PlainSide]:
    with given_back():
        side = PlainSide(config, Ranks("cpu"))
        with side.loader:
            yield side


def test_the_plain_loop_has_the_views_and_the_first_losses_of_a_run(run: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    views: list[Tensor] = []
    with plain_side(run.config) as side:
        step = side.loop.step

        def seen(*pair: Tensor) -> float:
            views.append(torch.stack(pair))
            return step(*pair)

        monkeypatch.setattr(side.loop, "step", seen)
        losses = [loss for epoch in range(2) for loss in side.epoch(epoch)]
    assert len(losses) == len(run.losses) == STEPS
    for made, wanted in zip(views, run.views, strict=True):
        torch.testing.assert_close(made, wanted)
    # later ones differ by more: differences of rounding grow tenfold a step
    torch.testing.assert_close(torch.tensor(losses[:3]), torch.tensor(run.losses[:3]), atol=1e-3, rtol=0)
    assert min(abs(later - run.losses[0]) for later in run.losses[1:3]) > 0.1  # another step's would not pass


def test_in_the_layout_of_a_run_the_plain_loop_ends_with_its_weights_and_queue(
    run: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plain_side(run.config) as side:
        monkeypatch.setattr(side.loop, "_format", torch.channels_last)  # the same sums, in the same order
        losses = [loss for epoch in range(2) for loss in side.epoch(epoch)]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(run.losses), atol=1e-3, rtol=0)
    trained = {name: value for name, value in side.method.state_dict().items() if name.startswith(TRAINED)}
    for name, value in (trained | {"queue.keys_KD": side.loop._queue_DK.T}).items():
        wanted = run.weights[name].float()
        assert (value.float() - wanted).norm() <= 0.01 * wanted.norm(), name


def test_a_line_with_both_curves_is_kept_and_not_measured_again(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    options = of_data(shards, tmp_path / "runs")
    assert equivalence.benchmark(options) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    (line,) = map(json.loads, (tmp_path / "equivalence.jsonl").read_text().splitlines())
    assert {name: list(curve) for name, curve in line["knn"].items()} == {
        "fasttrain": ["4", "8"],
        "plain fp32": ["4", "8"],
    }
    assert figures["seeds"] == [line["seed"]] == [3]
    last = [curve["8"] for curve in line["knn"].values()]
    assert figures["final_difference"] == round(abs(last[0] - last[1]), 3) <= figures["largest_difference"] < 10
    assert min(line["images_per_sec"].values()) > 0

    monkeypatch.setattr(equivalence, "fast", None)  # so that it can't be called
    assert equivalence.benchmark(options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    with pytest.raises(TypeError):
        equivalence.benchmark(of_data(shards, tmp_path / "runs", "--weight-decay 0.2"))


def test_the_table_has_means_of_the_seeds_and_their_difference(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        {"seed": 0, "knn": {"fasttrain": {"4": 10.0, "8": 30.0}, "plain fp32": {"4": 13.0, "8": 31.0}}},
        {"seed": 1, "knn": {"fasttrain": {"4": 12.0, "8": 34.0}, "plain fp32": {"4": 13.0, "8": 31.0}}},
    ]
    assert equivalence.show(found, 5) == {
        "seeds": [0, 1],
        "largest_difference": 2.0,
        "final_difference": 1.0,
        "std": {"fasttrain": 2.828, "plain fp32": 0.0},
    }
    assert "   10    32.00 ± 2.83    31.00 ± 0.00       +1.00" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--symmetric", "--symmetric True: the plain loop has False alone"),
        ("--method simclr", "--method simclr: the plain loop has 'moco' alone"),
        ("--optimizer lars", "--optimizer lars: the plain loop"),
        ("--queue-size 72", "--queue-size 72: the plain loop needs a multiple of --batch-size 16"),
    ],
)
def test_what_the_plain_loop_cannot_follow_is_refused_before_anything_is_trained(
    more: str, said: str, shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    options = of_data(shards, tmp_path / "runs", more)
    if "simclr" in more:
        options = EquivalenceBenchmark(str(shards), more, seeds=(3,), runs=str(tmp_path / "runs"))
    with pytest.raises(UserError, match=said):
        equivalence.benchmark(options)
    assert not (tmp_path / "runs").exists()


def test_no_measurement_and_no_seed_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="--knn-every 3 measures nothing in --epochs 2"):
        of_data(tmp_path, tmp_path, knn_every=3)
    with pytest.raises(UserError, match="--seeds"):
        of_data(tmp_path, tmp_path, seeds=())
