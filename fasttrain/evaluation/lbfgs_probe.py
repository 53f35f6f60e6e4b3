"""Logistic regression on frozen features with a grid of C, as in SimCLR's transfer (arXiv 2002.05709, appendix B.8) and
DINOv2's (arXiv 2304.07193) log_regression.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.evaluation.design import Design, offset_of_classes, ranked_by
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.ranking import CHOSEN_ON, Sharing, held_out_tenth, share_of_rows, summed
from fasttrain.evaluation.softmax_regression import SoftmaxRegression

C_GRID = tuple((10 ** np.linspace(-6, 5, 45)).tolist())
PATIENCE = 6  # values of C (a factor of 32) since the last that was better than all before
TOLERANCE = {"grid": 1e-4, "refit": 1e-6}  # of the gradient, see SoftmaxRegression.fit


def lbfgs_probe(
    train: Features, test: Features, num_classes: int, device: torch.device, ranks: Sharing
) -> tuple[Tensor, dict[str, Any]]:
    """Rank the classes of `test`, see evaluation/accuracy.py; with the settings.

    Features are as the encoder gives them: neither standardised nor normalised, as in both papers, so that a value of C
    means what it means there. C is the first of C_GRID with the most right answers of a tenth of train that is held
    out; then all of train is fitted. Each fit starts from the one before, which changes its time and not its optimum.
    The ranks share the rows.
    """
    inputs = _Inputs(train, device, ranks)
    chosen, tried, start_DC = _choose(train, inputs, num_classes)
    regression, offset_C = _regression(train, np.arange(len(train)), inputs, num_classes)
    weight_DC, converged = regression.fit(chosen, TOLERANCE["refit"], start_DC)
    ranked = ranked_by(weight_DC, offset_C, inputs.part_of(test, np.arange(len(test))))
    settings = {
        "solver": "lbfgs", "C": float(f"{chosen:.3g}"), "grid": "45 values of C, 1e-06 to 1e+05", "tried": tried,
        "chosen_on": CHOSEN_ON, "refit_on": "train", "standardised": False, "dtype": "float64",
        "tolerance": TOLERANCE, "converged": converged,
    }  # fmt: skip
    return torch.cat(ranks.gather(ranked)), settings


class _Inputs:
    """Centred features and a 1 for the intercept, of a rank's part of the rows.

    Centring moves the intercept and nothing else, as that is not penalised, and makes the problem better conditioned.
    """

    def __init__(self, train: Features, device: torch.device, ranks: Sharing) -> None:
        self.device, self._ranks, self.total = device, ranks, summed(ranks)
        rows = Design(train, np.arange(len(train))[share_of_rows(len(train), ranks)], lambda x_NF: x_NF, device)
        zeros_F = torch.zeros(train.width, dtype=torch.float64, device=device)
        total_F = sum((x_NF.sum(0) for x_NF, _ in rows), zeros_F)
        self.mean_F = self.total(total_F) / len(train)
        self.penalised_D = torch.cat([torch.ones_like(self.mean_F), self.mean_F.new_zeros(1)])

    def __call__(self, x_NF: Tensor) -> Tensor:
        return torch.cat([x_NF - self.mean_F, x_NF.new_ones(len(x_NF), 1)], 1)

    def part_of(self, features: Features, index_N: np.ndarray) -> Design:
        """This rank's part of these rows."""
        return Design(features, index_N[share_of_rows(len(index_N), self._ranks)], self, self.device)


def _regression(
    train: Features, index_N: np.ndarray, inputs: _Inputs, num_classes: int
) -> tuple[SoftmaxRegression, Tensor]:
    """Of these rows; with what it adds to the logits."""
    offset_C = offset_of_classes(train.label_N[index_N], num_classes, inputs.device)
    rows = inputs.part_of(train, index_N)
    return SoftmaxRegression(rows, offset_C, inputs.penalised_D, inputs.total), offset_C


def _choose(train: Features, inputs: _Inputs, num_classes: int) -> tuple[float, int, Tensor]:
    """The value of C, how many were tried, and its weights.

    Values are tried from the smallest, and no further than PATIENCE beyond the last whose held-out accuracy was higher
    or loss lower than all before: larger ones fit train better and the rest worse, and take the longest.
    """
    fitted, held_out = held_out_tenth(len(train))
    regression, offset_C = _regression(train, fitted, inputs, num_classes)
    rows = inputs.part_of(train, held_out)
    most, least, best, last = -1.0, float("inf"), 0, 0
    weight_DC = chosen_DC = None
    for number, C in enumerate(C_GRID):
        weight_DC, _ = regression.fit(C, TOLERANCE["grid"], weight_DC)
        right, loss = _score(rows, weight_DC, offset_C, inputs.total)
        if right > most:
            best, chosen_DC = number, weight_DC
        if right > most or loss < least:
            last = number
        most, least = max(most, right), min(least, loss)
        if number - last >= PATIENCE or right == len(held_out):
            break
    assert chosen_DC is not None
    return C_GRID[best], number + 1, chosen_DC


def _score(rows: Design, weight_DC: Tensor, offset_C: Tensor, total: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Right answers and summed cross-entropy over the rows of all ranks; a class that was not fitted adds no loss."""
    sums = weight_DC.new_zeros(2)
    for x_ND, label_N in rows:
        logit_NC = x_ND @ weight_DC + offset_C
        loss_N = -logit_NC.log_softmax(1).gather(1, label_N[:, None])
        sums += torch.stack([(logit_NC.argmax(1) == label_N).sum(), loss_N[loss_N.isfinite()].sum()])
    right, loss = total(sums).tolist()
    return right, loss
