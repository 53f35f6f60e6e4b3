"""The online probe: what it learns, that training does not notice it, skipped steps, ranks, restarts, refusals."""

import copy
import pathlib

import pytest
import torch
from support.forks import on_ranks, succeed
from support.launch import equal, final_state, train
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.engine.probe import LR, MOMENTUM, OnlineProbe
from fasttrain.engine.ranks import Ranks
from fasttrain.run.metrics import read_metrics
from fasttrain.system.errors import UserError

CPU = torch.device("cpu")
GOOD, BAD = torch.tensor(True), torch.tensor(False)
CLASSES, WIDTH, ROWS = 3, 6, 12


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Features of unlike scales, and labels of which one is missing."""
    generator = torch.Generator().manual_seed(number)
    label_N = torch.arange(ROWS) % CLASSES
    x_NF = torch.randn(ROWS, WIDTH, generator=generator) + 2 * F.one_hot(label_N, WIDTH)
    label_N[5] = -1
    return x_NF * torch.logspace(-1, 1, WIDTH) + 7, label_N


def learned(numbers: range, probe: OnlineProbe | None = None, good: Tensor = GOOD) -> OnlineProbe:
    probe = probe or OnlineProbe(CLASSES, CPU)
    for number in numbers:
        probe.learn(*batch(number), number / 20, good)
    return probe


def test_its_steps_are_those_of_softmax_regression_by_autograd() -> None:
    probe = learned(range(1))  # of which it takes statistics alone
    layer = nn.Linear(WIDTH, CLASSES).double()
    for p in layer.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.SGD(layer.parameters(), momentum=MOMENTUM)
    for number in range(1, 6):
        state = probe.state_dict()
        x_NF, label_N = batch(number)
        std_F = (state["square_F"] - state["mean_F"].square()).double().sqrt()
        std_F = (std_F.square() + 1e-4 * std_F.square().mean()).sqrt()
        optimizer.param_groups[0]["lr"] = LR / 2 * (1 + torch.tensor(torch.pi * number / 20).cos().item())
        scores_NC = layer((x_NF.double() - state["mean_F"]) / std_F / WIDTH**0.5)
        F.cross_entropy(scores_NC, label_N, ignore_index=-1).backward()
        optimizer.step()
        optimizer.zero_grad()
        learned(range(number, number + 1), probe)
    found = probe.state_dict()["weight_GC"].double()
    torch.testing.assert_close(found, torch.cat([layer.weight.T, layer.bias[None]]), rtol=1e-3, atol=1e-4)


def test_it_tells_classes_apart_whatever_the_features_scale() -> None:
    probe = learned(range(20))
    x_NF, label_N = batch(99)
    assert not OnlineProbe(CLASSES, CPU).has_learned
    score_NC = probe.scores(x_NF)
    assert score_NC.shape == (ROWS, CLASSES)
    assert (score_NC.argmax(1) == label_N)[label_N >= 0].float().mean() > 0.6


def test_a_skipped_step_and_one_without_labels_change_nothing() -> None:
    probe = learned(range(3))
    before = copy.deepcopy(probe.state_dict())
    x_NF, label_N = batch(3)
    probe.learn(x_NF, label_N, 0.2, BAD)
    probe.learn(torch.full_like(x_NF, torch.nan), label_N, 0.2, BAD)
    probe.learn(x_NF, torch.full_like(label_N, -1), 0.2, GOOD)
    assert equal(before, probe.state_dict()) == []


def test_a_label_that_is_no_class_is_left_out() -> None:
    x_NF, label_N = batch(3)
    one, other = learned(range(3)), learned(range(3))
    one.learn(x_NF, label_N, 0.2, GOOD)
    label_N[5] = CLASSES
    x_NF[5] = torch.nan
    other.learn(x_NF, label_N, 0.2, GOOD)
    assert equal(one.state_dict(), other.state_dict()) == []


def test_a_method_that_names_no_features_is_refused() -> None:
    with pytest.raises(UserError, match="features_NF"):
        OnlineProbe(CLASSES, CPU).learn(None, torch.zeros(2, dtype=torch.int64), 0.0, GOOD)


def _learn_on_ranks(folder: pathlib.Path) -> None:
    ranks = Ranks("cpu")
    probe, count = OnlineProbe(CLASSES, CPU), ROWS // ranks.world_size
    for number in range(5):
        x_NF, label_N = (each[ranks.rank * count :][:count] for each in batch(number))
        probe.learn(x_NF, label_N, number / 20, GOOD)
    torch.save(probe.state_dict(), folder / f"rank{ranks.rank}.pt")
    ranks.close()


def test_on_two_ranks_it_is_that_of_one(tmp_path: pathlib.Path) -> None:
    succeed(on_ranks(tmp_path, 2, _learn_on_ranks, tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert equal(first, second) == []
    for name, value in learned(range(5)).state_dict().items():
        torch.testing.assert_close(value, first[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", ["--method moco", "--accumulate 2 --precision fp16 --epochs 2"])
def test_training_is_the_same_with_and_without_it(shards: pathlib.Path, tmp_path: pathlib.Path, more: str) -> None:
    for name, probe in (("with", ["--online-probe"]), ("without", [])):
        assert train(shards, tmp_path / name, *more.split(), *probe) == 0
    one, other = final_state(tmp_path / "with"), final_state(tmp_path / "without")
    assert one.pop("probe")["weight_GC"].abs().max() > 0
    assert equal(one, other) == []


def test_a_run_goes_on_with_its_probe_to_the_bit_and_without_it_from_nothing(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = ["--online-probe", "--health-every", 4]
    assert train(shards, whole, *words) == 0
    assert train(shards, run, *words, "--max-steps", 7) == 0
    assert train(shards, run, *words) == 0
    assert equal(final_state(whole), final_state(run)) == []
    assert probe_accuracies(whole) == {k: v for k, v in probe_accuracies(run).items() if k != 7}
    assert list(probe_accuracies(whole)) == [4, 8, 12, 16]  # at step 0 it has learned nothing

    assert train(shards, tmp_path / "late", "--max-steps", 7) == 0
    assert train(shards, tmp_path / "late", *words) == 0
    assert list(probe_accuracies(tmp_path / "late")) == [8, 12, 16]


def probe_accuracies(run: pathlib.Path) -> dict[int, float]:
    return {e["step"]: e["probe_top1"] for e in read_metrics(run / "metrics.jsonl") if "probe_top1" in e}


def test_a_set_without_labels_is_refused_before_the_run_folder_is_made(
    image_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(image_folder / "train" / "class0", tmp_path / "run", "--online-probe") == 2
    assert "--online-probe needs labels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_set_without_val_split_is_refused(
    image_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(image_folder / "val", tmp_path / "run", "--online-probe") == 2
    assert "--online-probe is measured on the val split" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
