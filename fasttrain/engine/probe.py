"""The online probe: a linear classifier that learns from the encoder's features at every step, beside training.

Its gradient is written out and stays in it: the features are detached, and it draws nothing at random, so the encoder
is the same, to the bit, with and without it. Nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.system.collectives import sum_over_ranks
from fasttrain.system.errors import UserError

LR, MOMENTUM = 1.0, 0.9  # of features of length 1, for which softmax regression is stable whatever the encoder
MEMORY = 0.1  # share of the newest batch in the running statistics, as of batch norm
TINY = 1e-12
LEAST_VARIANCE = 1e-4  # of a dimension, as a part of the mean: one that is dead must not count for more


class OnlineProbe:
    """Softmax regression by SGD with momentum and a cosine schedule over the run.

    Features are standardised by running statistics of all ranks' batches, those before the one that is learned from,
    and scaled by 1/√F. A step takes one sum over the ranks.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._classes, self._device = classes, device
        self._state: dict[str, Tensor] = {}  # until the first step tells how wide the features are

    @property
    def has_learned(self) -> bool:
        """Has it seen any batch?"""
        return bool(self._state)

    @torch.no_grad()
    def learn(self, features_NF: Tensor | None, label_N: Tensor, part: float, good: Tensor) -> None:
        """Take a step on this rank's rows; one whose label is no class is left out. Every rank calls it.

        features_NF: Output.features_NF. label_N: int64, on the device. part: of the run that is done, for the schedule.
        good: 0-dim bool on the device; where it is false nothing changes. Raises UserError without features.
        """
        if features_NF is None:
            raise UserError("--online-probe: this method's output names no features of its encoder (features_NF)")
        state = self._state or self._zeros(features_NF.shape[1])
        known_N = (label_N >= 0) & (label_N < self._classes)
        x_NF = torch.where(known_N[:, None], features_NF.float(), 0.0)
        one_NG = _standardised(x_NF, state)
        target_NC = F.one_hot(label_N.clamp(0, self._classes - 1), self._classes)
        error_NC = ((one_NG @ state["weight_GC"]).softmax(1) - target_NC) * known_N[:, None]
        sums = [one_NG.T @ error_NC, x_NF.sum(0), x_NF.square().sum(0), known_N.sum()[None]]
        parts = sum_over_ranks(torch.cat([each.flatten().float() for each in sums])).split([s.numel() for s in sums])
        count = parts[3].clamp(min=1)
        gradient_GC, mean_F, square_F = parts[0].view_as(sums[0]) / count, parts[1] / count, parts[2] / count

        newest = (1 / (state["steps"] + 1)).clamp(min=MEMORY)
        velocity_GC = MOMENTUM * state["velocity_GC"] + gradient_GC * (state["steps"] > 0)  # before, none is standard
        moved = {
            "weight_GC": state["weight_GC"] - LR * (1 + math.cos(math.pi * part)) / 2 * velocity_GC,
            "velocity_GC": velocity_GC,
            "mean_F": state["mean_F"].lerp(mean_F, newest),
            "square_F": state["square_F"].lerp(square_F, newest),
            "steps": state["steps"] + 1,
        }
        learns = good & (parts[3] > 0)
        self._state = {name: torch.where(learns, value, state[name]) for name, value in moved.items()}

    @torch.no_grad()
    def scores(self, features_NF: Tensor) -> Tensor:
        """The logits of each row, (N, C) on the device."""
        return _standardised(features_NF.to(self._device).float(), self._state) @ self._state["weight_GC"]

    def state_dict(self) -> dict[str, Tensor]:
        """Empty before the first step."""
        return self._state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        names = self._zeros(len(state["mean_F"])) if state else ()
        self._state = {name: state[name].to(self._device) for name in names}

    def _zeros(self, width: int) -> dict[str, Tensor]:
        shapes = {
            "weight_GC": (width + 1, self._classes), "velocity_GC": (width + 1, self._classes),
            "mean_F": (width,), "square_F": (width,), "steps": (),
        }  # fmt: skip
        return {name: torch.zeros(shape, device=self._device) for name, shape in shapes.items()}


def _standardised(x_NF: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Rows of mean square 1/F in each dimension, and a column of ones for the bias."""
    variance_F = (state["square_F"] - state["mean_F"].square()).clamp(min=0)
    scale_F = (x_NF.shape[1] * (variance_F + LEAST_VARIANCE * variance_F.mean() + TINY)).rsqrt()
    return torch.cat([(x_NF - state["mean_F"]) * scale_F, torch.ones_like(x_NF[:, :1])], 1)
