"""The momentum encoder (MoCo, arXiv 1911.05722): a slowly moving average of the network that is trained."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from fasttrain.networks.vision_transformer import keep_paths


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that takes no gradient and drops no paths."""
    copied = copy.deepcopy(module).requires_grad_(False)
    keep_paths(copied)
    return copied


def cosine_momentum(start: float, part: float, end: float = 1.0) -> float:
    """Momentum that rises from `start` to `end` along half a cosine (BYOL, arXiv 2006.07733, section 3.3).

    part: of the run that is done, 0…1.
    """
    return end - (end - start) * (1 + math.cos(math.pi * part)) / 2


@torch.no_grad()
def ema_update(average: nn.Module, current: nn.Module, momentum: float, good: Tensor | None = None) -> None:
    """average ← average + (1 − momentum)·(current − average) over all parameters, in place.

    good: 0-dim bool on the device; where false, nothing changes. None: true.
    """
    averages: list[Tensor] = list(average.parameters())
    currents: list[Tensor] = list(current.parameters())
    if good is None or good.device.type == "cpu":  # a flag on the CPU can be looked at, and one fused pass is enough
        if good is None or good:
            torch._foreach_lerp_(averages, currents, 1 - momentum)
        return
    change = list(torch._foreach_sub(currents, averages))
    torch._foreach_mul_(change, (1 - momentum) * good)
    torch._foreach_add_(averages, change)
