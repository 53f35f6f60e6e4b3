"""Softmax regression by SGD on standardised features, with a grid of learning rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.engine.optim import learning_rate
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.ranking import CHOSEN_ON, NEVER, Sharing, best_classes, held_out_tenth

EPOCHS, BATCH_SIZE, MOMENTUM = 50, 256, 0.9
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
CHUNK_ROWS = 16384


def sgd_probe(
    train: Features, test: Features, num_classes: int, device: torch.device, ranks: Sharing
) -> tuple[Tensor, dict[str, Any]]:
    """Rank the classes of `test`, see evaluation/accuracy.py; with the settings.

    SGD with a cosine schedule, EPOCHS passes over nine tenths of train, once for each of LEARNING_RATES; the tenth held
    out chooses among them. Features are standardised with train's statistics. Deterministic: the ranks share the
    learning rates, and each is trained as one rank trains it.
    """
    fitted, held_out = held_out_tenth(len(train))
    mean_F, std_F = _statistics(train, device)
    rates = LEARNING_RATES[ranks.rank :: ranks.world_size]
    classifiers = [_Classifier(rate, len(mean_F), num_classes, device) for rate in rates]
    _fit(classifiers, train, fitted, mean_F, std_F)
    mine = {}
    for classifier in classifiers:
        ranked = _ranked(classifier, train, held_out, mean_F, std_F)
        mine[classifier.rate] = int((ranked[:, 0] == train.label_N[held_out]).sum())
    right = {rate: count for of_rank in ranks.gather(mine) for rate, count in of_rank.items()}
    chosen = max(LEARNING_RATES, key=lambda rate: right[rate])  # the first, of several
    rows = np.arange(len(test))
    found = [_ranked(each, test, rows, mean_F, std_F) for each in classifiers if each.rate == chosen]
    settings = {
        "solver": "sgd", "lr": chosen, "grid": list(LEARNING_RATES), "chosen_on": CHOSEN_ON, "refit_on": "nothing",
        "standardised": True, "epochs": EPOCHS, "batch_size": BATCH_SIZE, "momentum": MOMENTUM, "weight_decay": 0,
        "schedule": "cosine",
    }  # fmt: skip
    return next(part for of_rank in ranks.gather(found) for part in of_rank), settings


class _Classifier:
    """Of one learning rate: weights and their velocities, and 0 or NEVER for classes that it has seen or has not."""

    def __init__(self, rate: float, num_features: int, num_classes: int, device: torch.device) -> None:
        self.rate = rate
        self.weight_FC, self._velocity_FC = (torch.zeros(num_features, num_classes, device=device) for _ in range(2))
        self.bias_C, self._velocity_C = (torch.zeros(num_classes, device=device) for _ in range(2))
        self.offset_C = torch.full((num_classes,), NEVER, device=device)

    def step(self, x_NF: Tensor, target_N: Tensor, decay: float) -> None:
        # the gradient of mean cross-entropy with respect to the logits: (softmax − one-hot) / N
        error_NC = (x_NF @ self.weight_FC + self.bias_C).softmax(1)
        error_NC[torch.arange(len(target_N), device=target_N.device), target_N] -= 1
        error_NC /= len(target_N)
        self._velocity_FC.mul_(MOMENTUM).add_(x_NF.T @ error_NC)
        self._velocity_C.mul_(MOMENTUM).add_(error_NC.sum(0))
        self.weight_FC.sub_(self._velocity_FC, alpha=decay * self.rate)
        self.bias_C.sub_(self._velocity_C, alpha=decay * self.rate)
        self.offset_C[target_N] = 0.0

    def scores(self, x_NF: Tensor) -> Tensor:
        return x_NF @ self.weight_FC + self.bias_C + self.offset_C


def _statistics(features: Features, device: torch.device) -> tuple[Tensor, Tensor]:
    chunks = [slice(first, first + CHUNK_ROWS) for first in range(0, len(features), CHUNK_ROWS)]
    mean_F = sum(features.rows(rows, device).double().sum(0) for rows in chunks) / len(features)
    var_F = sum((features.rows(rows, device).double() - mean_F).square().sum(0) for rows in chunks) / len(features)
    return torch.as_tensor(mean_F).float(), torch.as_tensor(var_F).sqrt().clamp_min(1e-6).float()


def _fit(classifiers: list[_Classifier], train: Features, rows: np.ndarray, mean_F: Tensor, std_F: Tensor) -> None:
    steps = -(-len(rows) // BATCH_SIZE)
    for epoch in range(EPOCHS if classifiers else 0):
        shuffled = np.random.default_rng(epoch + 1).permutation(rows)
        for step in range(steps):
            batch = np.sort(shuffled[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
            x_NF = (train.rows(batch, mean_F.device) - mean_F) / std_F
            target_N = train.label_N[batch].to(mean_F.device)
            decay = learning_rate(epoch * steps + step, EPOCHS * steps, 0, 1.0)
            for classifier in classifiers:
                classifier.step(x_NF, target_N, decay)


def _ranked(classifier: _Classifier, features: Features, rows: np.ndarray, mean_F: Tensor, std_F: Tensor) -> Tensor:
    parts = [rows[first : first + CHUNK_ROWS] for first in range(0, len(rows), CHUNK_ROWS)]
    inputs = ((features.rows(part, mean_F.device) - mean_F) / std_F for part in parts)
    return torch.cat([best_classes(classifier.scores(x_NF)) for x_NF in inputs])
