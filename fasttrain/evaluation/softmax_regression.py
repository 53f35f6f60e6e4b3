"""Softmax regression with an L2 penalty, to its optimum: L-BFGS in fp64 over all rows (Nocedal & Wright, chapter 7).

It minimises Σ cross-entropy + ‖W‖² / (2C), as scikit-learn and cuML do for more than two classes, so C means the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

MOST_STEPS = 1000  # as DINOv2's probe
MEMORY = 20  # pairs of steps and changes of gradient that stand for the curvature
ENOUGH = 1e-4  # of the decrease that the slope promises: a shorter step is tried below it
NOISE = 1e-9  # a first gradient below this part of Σ ‖x‖² is rounding, as of features that are all the same
ROUNDING = 1e-13  # by which a sum over all rows may seem to rise

Chunks = Iterable[tuple[Tensor, Tensor]]  # inputs (n, D) fp64 and classes (n,) int64, some at a time, each time anew


class _Point(NamedTuple):
    weight_DC: Tensor
    value: float
    gradient_DC: Tensor
    spread: float  # mean of p(1 − p): how far from certain the predictions are, which scales the curvature


class SoftmaxRegression:
    """One classifier for each C that is asked for, over the same rows."""

    def __init__(
        self, rows: Chunks, offset_C: Tensor, penalised_D: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part
    ) -> None:
        """rows: of this process; total: sums over all that share them. offset_C: is added to the logits: 0, or −∞ for a
        class that no row has, whose weights stay 0. penalised_D: 1, or 0 for the input that is an intercept's.

        The Hessian is Σ x xᵀ ⊗ (diag(p) − p pᵀ) + 1/C. With its right-hand part's mean in place of each row's it is
        known in the basis of Σ x xᵀ, and a hundred steps become ten: this is the first guess of L-BFGS.
        """
        self._rows, self._total, self._offset_C, self._penalised_D = rows, total, offset_C, penalised_D
        self._zeros_DC = penalised_D.new_zeros(len(penalised_D), len(offset_C))
        scatter_DD = penalised_D.new_zeros(len(penalised_D), len(penalised_D))
        for x_ND, _ in rows:
            scatter_DD.addmm_(x_ND.T, x_ND)
        scatter_D, self._basis_DD = torch.linalg.eigh(total(scatter_DD))
        self._scatter_D1 = scatter_D.clamp_min(0)[:, None]
        self._penalty_D1 = (self._basis_DD.square().T @ penalised_D)[:, None]
        first_norm = float(self._at(self._zeros_DC, 1.0).gradient_DC.norm())
        self._first_norm = max(first_norm, NOISE * float(scatter_D.sum()))

    def fit(self, C: float, tolerance: float, start_DC: Tensor | None = None) -> tuple[Tensor, bool]:
        """Weights (D, C), and whether their gradient's norm is below `tolerance` times that of all weights 0.

        start_DC: weights that are near, for speed; the optimum is one.
        """
        point = self._at(self._zeros_DC if start_DC is None else start_DC, C)
        pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=MEMORY)
        for _ in range(MOST_STEPS):
            if point.gradient_DC.norm() <= tolerance * self._first_norm:
                return point.weight_DC, True
            following = self._line_search(point, self._direction(point, pairs, C), C)
            if following is None:
                break
            step_DC, change_DC = following.weight_DC - point.weight_DC, following.gradient_DC - point.gradient_DC
            if (product := float((step_DC * change_DC).sum())) > 0:
                pairs.append((step_DC, change_DC, product))
            point = following
        return point.weight_DC, False

    def _at(self, weight_DC: Tensor, C: float) -> _Point:
        sums = weight_DC.new_zeros(3)  # cross-entropy, p(1 − p), rows
        gradient_DC = torch.zeros_like(weight_DC)
        for x_ND, target_N in self._rows:
            log_p_NC = (x_ND @ weight_DC + self._offset_C).log_softmax(1)
            sums[0] -= log_p_NC.gather(1, target_N[:, None]).sum()
            p_NC = log_p_NC.exp_()
            sums[1] += (p_NC - p_NC.square()).sum()
            sums[2] += len(x_ND)
            p_NC.scatter_add_(1, target_N[:, None], p_NC.new_full((len(x_ND), 1), -1.0))
            gradient_DC.addmm_(x_ND.T, p_NC)
        packed = self._total(torch.cat([sums, gradient_DC.flatten()]))
        loss, spread, count = packed[:3].tolist()
        penalised_DC = self._penalised_D[:, None] * weight_DC / C
        value = loss + float((penalised_DC * weight_DC).sum()) / 2
        return _Point(
            weight_DC, value, packed[3:].view_as(weight_DC) + penalised_DC, spread / (count * weight_DC.shape[1])
        )

    def _guessed(self, gradient_DC: Tensor, spread: float, C: float) -> Tensor:
        """The inverse of the guessed Hessian times a gradient."""
        # a spread of 0, where all is certain, would let the intercept's entry vanish
        curvature_D1 = max(spread, 1e-12) * self._scatter_D1 + self._penalty_D1 / C
        return self._basis_DD @ (self._basis_DD.T @ gradient_DC / curvature_D1)

    def _direction(self, point: _Point, pairs: deque[tuple[Tensor, Tensor, float]], C: float) -> Tensor:
        """The two-loop recursion (algorithm 7.4)."""
        out_DC, along = point.gradient_DC, []
        for step_DC, change_DC, product in reversed(pairs):
            along.append((step_DC * out_DC).sum() / product)
            out_DC = out_DC - along[-1] * change_DC
        out_DC = self._guessed(out_DC, point.spread, C)
        if pairs:
            _, change_DC, product = pairs[-1]
            out_DC = out_DC * (product / (change_DC * self._guessed(change_DC, point.spread, C)).sum())
        for (step_DC, change_DC, product), part in zip(pairs, reversed(along), strict=True):
            out_DC = out_DC + step_DC * (part - (change_DC * out_DC).sum() / product)
        return -out_DC

    def _line_search(self, point: _Point, direction_DC: Tensor, C: float) -> _Point | None:
        """The first point of steps 1, ½, ¼ … that is lower by ENOUGH; None where rounding lets none be."""
        slope, length = float((direction_DC * point.gradient_DC).sum()), 1.0
        while length > 1e-8:
            following = self._at(point.weight_DC + length * direction_DC, C)
            if following.value <= point.value + ENOUGH * length * slope + ROUNDING * abs(point.value):
                return following
            length /= 2
        return None
