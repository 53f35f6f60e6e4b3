"""Few-shot classification on frozen features: a linear classifier of k images of each class, for several draws.

The classifier is that of MSN (arXiv 2204.07141, logistic_eval.py), which is what 1, 2 and 5 images a class of ImageNet
are compared by: softmax regression without an intercept on rows that are centred and L2-normalised, with
‖W‖² / (2 · 4000) beside the sum of cross-entropies. Nothing is chosen, so nothing needs a held-out part.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.evaluation.design import Design, offset_of_classes, ranked_by
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.ranking import Sharing
from fasttrain.evaluation.softmax_regression import SoftmaxRegression

C = 4000.0  # 1 / 0.00025, of MSN
TOLERANCE = 1e-5  # of the gradient, see SoftmaxRegression.fit


def few_shot(
    memory: Features, queries: Features, num_classes: int, shots: int, draws: int, device: torch.device, ranks: Sharing
) -> tuple[Tensor, dict[str, Any]]:
    """Rank the queries' classes, see evaluation/accuracy.py, by each draw of `shots` images a class; with the settings.

    (draws · N, r), all queries by the first draw, then all by the second. Among the settings, as top1_std, is the
    standard deviation of top-1 over the draws, in points.
    A draw depends on its number and the labels alone. The ranks share the draws, and all return the same.
    """
    asked = Design(queries, np.arange(len(queries)), _inputs, device)
    penalised_D = torch.ones(memory.width, dtype=torch.float64, device=device)
    mine = {}
    for draw in range(ranks.rank, draws, ranks.world_size):
        drawn = drawn_rows(memory.label_N, shots, draw)
        rows = Design(memory, drawn, _inputs, device)
        offset_C = offset_of_classes(memory.label_N[drawn], num_classes, device)
        weight_DC, _ = SoftmaxRegression(rows, offset_C, penalised_D).fit(C, TOLERANCE)
        mine[draw] = ranked_by(weight_DC, offset_C, asked)
    found = {draw: ranked for of_rank in ranks.gather(mine) for draw, ranked in of_rank.items()}
    fewer = int((memory.label_N.bincount(minlength=num_classes) < shots).sum())
    settings = {
        "shots": shots, "draws": draws, "classes_with_fewer": fewer, "classifier": "logistic regression", "C": C,
        "intercept": False, "normalised": True,
    }  # fmt: skip
    if draws > 1:
        right = [float((found[draw][:, 0] == queries.label_N).double().mean()) for draw in range(draws)]
        settings["top1_std"] = round(100 * statistics.stdev(right), 2)
    return torch.cat([found[draw] for draw in range(draws)]), settings


def drawn_rows(label_N: Tensor, shots: int, draw: int) -> np.ndarray:
    """Which rows a draw takes, in order: `shots` of each class, all of a class that has fewer."""
    label = label_N.numpy()
    shuffled = np.random.default_rng((shots, draw)).permutation(len(label))
    by_class = shuffled[np.argsort(label[shuffled], kind="stable")]
    _, first, count = np.unique(label[by_class], return_index=True, return_counts=True)
    place = np.arange(len(label)) - np.repeat(first, count)  # within its class
    return np.sort(by_class[place < shots])


def _inputs(x_NF: Tensor) -> Tensor:
    return F.normalize(x_NF - x_NF.mean(1, keepdim=True), dim=1)
