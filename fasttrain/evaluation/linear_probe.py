"""Linear probe: a linear classifier on frozen, standardised features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fasttrain.engine.optim import learning_rate
from fasttrain.evaluation.accuracy import RANKED
from fasttrain.evaluation.features import Features

EPOCHS, BATCH_SIZE, MOMENTUM = 50, 256, 0.9
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)  # all are trained at once; a held-out part of train chooses
HELD_OUT = 0.1
CHUNK_ROWS = 16384


def linear_probe(train: Features, test: Features, num_classes: int, device: torch.device) -> Tensor:
    """Rank the classes of `test`, see evaluation/accuracy.py, by softmax regression fitted to `train`.

    SGD with a cosine schedule, EPOCHS passes over nine tenths of train, once for each of LEARNING_RATES side by side;
    the tenth held out chooses among them, so `test` is used once. Features are standardised with train's statistics.
    Deterministic.
    """
    order = np.random.default_rng(0).permutation(len(train.label_N))
    held_out = np.sort(order[: max(1, int(HELD_OUT * len(order)))])
    fitted = order[len(held_out) :]
    mean_F, std_F = _statistics(train, device)
    weight_LFC, bias_LC = _fit(train, fitted, mean_F, std_F, num_classes)
    found_LNr = _predicted(train, held_out, mean_F, std_F, weight_LFC, bias_LC)
    best = int((found_LNr[..., 0] == train.label_N[held_out]).sum(1).argmax())
    rows = np.arange(len(test.label_N))
    return _predicted(test, rows, mean_F, std_F, weight_LFC[best : best + 1], bias_LC[best : best + 1])[0]


def _statistics(features: Features, device: torch.device) -> tuple[Tensor, Tensor]:
    total = len(features.label_N)
    chunks = [slice(first, first + CHUNK_ROWS) for first in range(0, total, CHUNK_ROWS)]
    mean_F = sum(features.rows(rows, device).double().sum(0) for rows in chunks) / total
    var_F = sum((features.rows(rows, device).double() - mean_F).square().sum(0) for rows in chunks) / total
    return torch.as_tensor(mean_F).float(), torch.as_tensor(var_F).sqrt().clamp_min(1e-6).float()


def _fit(
    features: Features, rows: np.ndarray, mean_F: Tensor, std_F: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Weights (L, F, C) and biases (L, C), one for each learning rate."""
    device, lr_L = mean_F.device, torch.tensor(LEARNING_RATES, device=mean_F.device)
    weight_LFC = torch.zeros(len(lr_L), len(mean_F), num_classes, device=device)
    bias_LC = torch.zeros(len(lr_L), num_classes, device=device)
    velocity = torch.zeros_like(weight_LFC), torch.zeros_like(bias_LC)
    steps = -(-len(rows) // BATCH_SIZE)
    for epoch in range(EPOCHS):
        shuffled = np.random.default_rng(epoch + 1).permutation(rows)
        for step in range(steps):
            batch = np.sort(shuffled[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
            x_NF = (features.rows(batch, device) - mean_F) / std_F
            target_N = features.label_N[batch].to(device)
            # the gradient of mean cross-entropy with respect to the logits: (softmax − one-hot) / N
            error_LNC = (x_NF @ weight_LFC + bias_LC[:, None]).softmax(-1)
            error_LNC[:, torch.arange(len(batch), device=device), target_N] -= 1
            error_LNC /= len(batch)
            decay = learning_rate(epoch * steps + step, EPOCHS * steps, 0, 1.0)
            velocity[0].mul_(MOMENTUM).add_(x_NF.T @ error_LNC)
            velocity[1].mul_(MOMENTUM).add_(error_LNC.sum(1))
            weight_LFC -= decay * lr_L[:, None, None] * velocity[0]
            bias_LC -= decay * lr_L[:, None] * velocity[1]
    return weight_LFC, bias_LC


def _predicted(
    features: Features, rows: np.ndarray, mean_F: Tensor, std_F: Tensor, weight_LFC: Tensor, bias_LC: Tensor
) -> Tensor:
    """The classes that each of the L classifiers ranks first for each row, (L, N, r) int64 on the CPU."""
    parts = []
    for first in range(0, len(rows), CHUNK_ROWS):
        x_NF = (features.rows(rows[first : first + CHUNK_ROWS], mean_F.device) - mean_F) / std_F
        parts.append((x_NF @ weight_LFC + bias_LC[:, None]).topk(min(RANKED, bias_LC.shape[1])).indices.cpu())
    return torch.cat(parts, 1)
