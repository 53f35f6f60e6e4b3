"""The readout, the log-sum-exp and the look-up in plain torch, as short as their formulas.

`maximum`: whether a row's largest similarity is asked for, max_j x_i·Q_j/τ_i, without gradient; else it has no rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def readout(
    x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int | None, maximum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """lse_i = log Σ_j exp(x_i·Q_j/τ_i),  O_i = Σ_j softmax_j(x_i·Q_j/τ_i) Q_j; row i leaves out key own + i."""
    s_RK = _similarities(x_RD, queue_KD, temperature_R, own)
    return s_RK.logsumexp(1), s_RK.softmax(1) @ queue_KD, _maximum(s_RK, maximum)


def log_sum_exp(
    x_RD: Tensor, keys_KD: Tensor, temperature_R: Tensor, own: int | None, maximum: bool
) -> tuple[Tensor, Tensor]:
    """log Σ_j exp(x_i·y_j/τ_i); row i leaves out key own + i."""
    s_RK = _similarities(x_RD, keys_KD, temperature_R, own)
    return s_RK.logsumexp(1), _maximum(s_RK, maximum)


def nearest(x_RD: Tensor, queue_KD: Tensor) -> Tensor:
    """argmax_j x_i·Q_j"""
    return (x_RD @ queue_KD.T).argmax(1)


def _similarities(x_RD: Tensor, keys_KD: Tensor, temperature_R: Tensor, own: int | None) -> Tensor:
    s_RK = x_RD @ keys_KD.T / temperature_R[:, None]
    if own is not None:
        s_RK = s_RK.masked_fill(_own(len(x_RD), len(keys_KD), own, s_RK.device), -math.inf)
    return s_RK


def _maximum(s_RK: Tensor, wanted: bool) -> Tensor:
    return s_RK.detach().amax(1) if wanted else s_RK.new_empty(0)


def _own(rows: int, keys: int, first: int, device: torch.device) -> Tensor:
    """(rows, keys), true where key first + i is row i's own."""
    return torch.arange(keys, device=device) == torch.arange(rows, device=device)[:, None] + first
