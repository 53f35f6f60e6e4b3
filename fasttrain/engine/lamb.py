"""LAMB, for where NVIDIA's apex is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-6  # apex's own


class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive moments (You et al., arXiv 1904.00962, algorithm 2), as NVIDIA's apex has them.

    u = m̂ / (√v̂ + ε) + λ·w, then w ← w − lr · u · ‖w‖ / ‖u‖, with Adam's m̂ and v̂, for weights of decay λ. Where λ or
    a norm is 0, the factor is 1. Steps are counted by the group. Its state is that of apex's FusedLAMB: a run may go on
    with the other one.
    """

    _step_supports_amp_scaling = True  # see take_step; gradients have no scale of their own then

    def __init__(self, groups: list[dict], lr: float) -> None:
        """groups: parameters with their "weight_decay", those of a group on one device."""
        self.found_inf: Tensor | None = None  # fp32, 1 for a step that must change nothing
        super().__init__(groups, {"lr": lr})
        for group in self.param_groups:
            group["step"] = torch.zeros((), device=group["params"][0].device)
            for p in group["params"]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            bad = torch.zeros_like(group["step"]) if self.found_inf is None else self.found_inf
            group["step"] += 1 - bad
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._move(weights, group, bad)

    def _move(self, weights: list, group: dict[str, Any], bad: Tensor) -> None:
        """Move the weights, and their moments."""
        first, second = ([self.state[p][name] for p in weights] for name in ("exp_avg", "exp_avg_sq"))
        move = torch._foreach_mul(weights, 0.0)
        # torch's fused Adam moves zeros by −m̂ / (√v̂ + ε), or leaves all as it is where the step is bad.
        torch._fused_adam_(
            move, [p.grad for p in weights], first, second, [], [group["step"]] * len(weights), lr=1.0, beta1=BETAS[0],
            beta2=BETAS[1], weight_decay=0.0, eps=EPS, amsgrad=False, maximize=False, found_inf=bad,
        )  # fmt: skip
        if group["weight_decay"]:
            torch._foreach_add_(move, weights, alpha=-group["weight_decay"])
            weight_norm_P, move_norm_P = (torch.stack(torch._foreach_norm(each)) for each in (weights, move))
            ratio_P = torch.where((weight_norm_P > 0) & (move_norm_P > 0), weight_norm_P / move_norm_P, 1.0)
            torch._foreach_mul_(move, list((ratio_P * (1 - bad)).unbind()))
        torch._foreach_add_(weights, move, alpha=group["lr"])

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for group in state["param_groups"]:
            group["step"] = int(group["step"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["step"] = torch.tensor(float(group["step"]), device=group["params"][0].device)
