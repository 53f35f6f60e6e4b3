"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

MOMENTUM = 0.9  # of SGD, in every recipe that the presets follow


def make_optimizer(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with momentum over the parameters that take gradients, one fused pass a step."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay, fused=True)


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to 0 at total_steps (SGDR, arXiv 1608.03983, without restarts).

    A pure function of the step, so there is no schedule state to save.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
