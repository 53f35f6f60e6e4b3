"""Linear probes: what they find, what they choose on, and what they are sure not to use."""

import pathlib
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from support.features import drawn, in_memory
from support.forks import on_ranks, succeed

from fasttrain.engine.ranks import Ranks
from fasttrain.evaluation import design, lbfgs_probe, sgd_probe
from fasttrain.evaluation.accuracy import accuracy
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.few_shot import few_shot
from fasttrain.evaluation.knn import knn
from fasttrain.evaluation.linear_probe import linear_probe
from fasttrain.evaluation.ranking import ALONE, held_out_tenth

CPU = torch.device("cpu")
SOLVERS: tuple[Literal["sgd", "lbfgs"], ...] = ("sgd", "lbfgs")
solvers = pytest.mark.parametrize("solver", SOLVERS)


@solvers
def test_a_linear_probe_separates_what_is_separable(solver: Literal["sgd", "lbfgs"]) -> None:
    label_N = np.arange(200) % 7
    features = in_memory(np.eye(7)[label_N], label_N)
    ranked_Nr, _ = linear_probe(features, features, 7, CPU, ALONE, solver)
    assert (ranked_Nr.shape, ranked_Nr.dtype) == ((200, 5), torch.int64)
    assert accuracy(ranked_Nr, features.label_N, 7)[:2] == (100.0, 100.0)


@solvers
def test_val_is_classified_and_never_chosen_on(solver: Literal["sgd", "lbfgs"]) -> None:
    """With other labels of val, nothing is chosen otherwise and no answer is another."""
    train, test = drawn(200, 4, 0), drawn(50, 4, 1)
    first = linear_probe(train, test, 4, CPU, ALONE, solver)
    second = linear_probe(train, replace(test, label_N=test.label_N.flip(0)), 4, CPU, ALONE, solver)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert first[1]["chosen_on"] == "a held-out tenth of train"


@solvers
def test_a_class_that_train_lacks_is_never_named(solver: Literal["sgd", "lbfgs"]) -> None:
    train, test = drawn(100, 3, 0), drawn(30, 3, 1)
    ranked_Nr, _ = linear_probe(train, replace(test, label_N=torch.full((30,), 4)), 6, CPU, ALONE, solver)
    assert ranked_Nr[:, :3].sort(1).values.tolist() == [[0, 1, 2]] * 30
    assert (ranked_Nr[:, 3:] == -1).all()


@solvers
def test_features_that_are_all_the_same_give_the_majority(solver: Literal["sgd", "lbfgs"]) -> None:
    features = in_memory(np.full((60, 5), 0.3), np.repeat([0, 2, 1], (10, 35, 15)))
    ranked_Nr, _ = linear_probe(features, features, 3, CPU, ALONE, solver)
    assert (ranked_Nr[:, 0] == 2).all()


@solvers
@pytest.mark.parametrize("count", [1, 2])
def test_hardly_any_image_of_train_is_enough_to_begin_with(solver: Literal["sgd", "lbfgs"], count: int) -> None:
    train = in_memory(np.eye(2)[:count], np.arange(count))
    ranked_Nr, _ = linear_probe(train, drawn(3, 2, 0, width=2), 2, CPU, ALONE, solver)
    assert ranked_Nr.shape == (3, 2)


def test_sgds_settings_name_the_learning_rate_and_the_recipe() -> None:
    train = drawn(200, 4, 0)
    _, settings = linear_probe(train, train, 4, CPU, ALONE)
    assert settings["lr"] in settings["grid"]
    assert settings | {"lr": 0} == {
        "solver": "sgd", "lr": 0, "grid": [0.003, 0.01, 0.03, 0.1, 0.3], "chosen_on": "a held-out tenth of train",
        "refit_on": "nothing", "standardised": True, "epochs": 50, "batch_size": 256, "momentum": 0.9,
        "weight_decay": 0, "schedule": "cosine",
    }  # fmt: skip


@pytest.mark.parametrize("rates", [(1e4, 0.01), (0.01, 1e4)])
def test_the_learning_rate_is_the_best_of_the_held_out_tenth(
    monkeypatch: pytest.MonkeyPatch, rates: tuple[float, ...]
) -> None:
    monkeypatch.setattr(sgd_probe, "LEARNING_RATES", rates)
    train = drawn(1000, 4, 0)
    assert linear_probe(train, train, 4, CPU, ALONE)[1]["lr"] == 0.01


def test_lbfgs_chooses_the_first_best_c_of_the_whole_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scikit-learn at every value that was tried, and refitted on all of train."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    grid = tuple(float(f"{C:.3g}") for C in 10 ** np.linspace(-4, 2, 7))
    monkeypatch.setattr(lbfgs_probe, "C_GRID", grid)
    monkeypatch.setattr(lbfgs_probe, "TOLERANCE", {"grid": 1e-8, "refit": 1e-8})
    train, test = drawn(400, 4, 0), drawn(300, 4, 1)
    ranked_Nr, settings = linear_probe(train, test, 4, CPU, ALONE, "lbfgs")
    fitted, held_out = held_out_tenth(400)
    x_NF, label_N = np.float64(train.values_NF[:]), train.label_N.numpy()

    def theirs(C: float, rows: np.ndarray) -> "linear_model.LogisticRegression":
        return linear_model.LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(x_NF[rows], label_N[rows])

    right = [(theirs(C, fitted).predict(x_NF[held_out]) == label_N[held_out]).sum() for C in grid]
    assert len(set(right)) > 1
    assert settings["C"] == grid[int(np.argmax(right))]
    other = theirs(settings["C"], np.arange(400))
    np.testing.assert_array_equal(ranked_Nr[:, 0], other.predict(np.float64(test.values_NF[:])))
    assert settings["converged"]
    assert (settings["refit_on"], settings["standardised"]) == ("train", False)


def test_the_grid_ends_where_larger_values_only_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    train = drawn(150, 3, 0, noise=3.0, width=40)
    _, settings = linear_probe(train, train, 3, CPU, ALONE, "lbfgs")
    assert settings["tried"] < 45
    monkeypatch.setattr(lbfgs_probe, "PATIENCE", 100)
    _, whole = linear_probe(train, train, 3, CPU, ALONE, "lbfgs")
    assert whole == settings | {"tried": 45}


def test_inputs_that_do_not_fit_are_read_anew_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = drawn(150, 3, 0), drawn(40, 3, 1)
    kept = linear_probe(train, test, 3, CPU, ALONE, "lbfgs")
    monkeypatch.setattr(design, "KEPT_BYTES", 0)
    assert design.Design(train, np.arange(9), lambda x_NF: x_NF, CPU)._kept is None
    read = linear_probe(train, test, 3, CPU, ALONE, "lbfgs")
    assert torch.equal(kept[0], read[0])
    assert kept[1] == read[1]


def _protocols(train: Features, test: Features, ranks: Ranks) -> list[object]:
    """What every protocol over features gives, as plain numbers."""
    found = knn(train, test, 5, [1, 20], [0.07, 0.2], CPU, ranks)
    results: list[object] = [{pair: ranked_Nr.tolist() for pair, ranked_Nr in found.items()}]
    results += [(ranked_Nr.tolist(), settings) for ranked_Nr, settings in (
        *(linear_probe(train, test, 5, CPU, ranks, solver) for solver in SOLVERS),
        few_shot(train, test, 5, 3, 3, CPU, ranks),
    )]  # fmt: skip
    return results


def _on_a_rank(folder: pathlib.Path) -> None:
    ranks = Ranks("cpu")
    torch.save(_protocols(drawn(300, 5, 0), drawn(600, 5, 1), ranks), folder / f"{ranks.rank}.pt")
    ranks.close()


def test_two_ranks_give_ones_answers_on_both(tmp_path: pathlib.Path) -> None:
    succeed(on_ranks(tmp_path, 2, _on_a_rank, tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first == second == _protocols(drawn(300, 5, 0), drawn(600, 5, 1), ALONE)
