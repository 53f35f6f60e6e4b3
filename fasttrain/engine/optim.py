"""Optimizers and the learning-rate schedule.

A step whose gradients are not finite must change nothing. The fused optimizers of torch decide that on the device, so
the host need not wait for the gradients: see take_step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fasttrain.system.errors import UserError

MOMENTUM = 0.9  # of SGD and LARS, in every recipe that the presets follow
TRUST = 1e-3  # LARS: step length relative to the weights' norm


def make_optimizer(name: str, module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of the parameters that take gradients: "sgd", "adamw", "lars" or "lamb".

    All but SGD (as MoCo trains) leave parameters of one dimension, biases and norms, without weight decay.
    Raises UserError where LAMB is not installed.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay}
    vectors = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors) if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "lamb":
        return _apex_lamb(groups, lr)
    optimizer = (
        LARS(groups, lr)
        if name == "lars"
        else torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay, fused=True)
    )
    for p in parameters:  # else torch leaves them uninitialised where the very first step is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888, algorithm 1), as MoCo v3 uses it.

    g ← (g + β·w) · TRUST·‖w‖ / ‖g + β·w‖  for every matrix or kernel w of weight decay β; then SGD with momentum.
    Parameters of one dimension are not scaled. Where a norm is 0 the factor is 1.
    """

    def __init__(self, groups: list[dict], lr: float) -> None:
        """groups: parameters with their "weight_decay". Gradients are scaled in place by step()."""
        renamed = [{"params": group["params"], "decay": group["weight_decay"]} for group in groups]
        super().__init__(renamed, lr=lr, momentum=MOMENTUM, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.dim() > 1 and p.grad is not None]
            if weights:
                _scale_by_trust([p.grad for p in weights], weights, group["decay"])
        super().step()


def _scale_by_trust(gradients: list[Tensor], weights: list[Tensor], decay: float) -> None:
    torch._foreach_add_(gradients, weights, alpha=decay)
    weight_norm_P = torch.stack(torch._foreach_norm(weights))
    gradient_norm_P = torch.stack(torch._foreach_norm(gradients))
    ratio_P = TRUST * weight_norm_P / gradient_norm_P
    ratio_P = torch.where((weight_norm_P > 0) & (gradient_norm_P > 0), ratio_P, 1.0)
    torch._foreach_mul_(gradients, list(ratio_P.unbind()))


def _apex_lamb(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import FusedLAMB

        return FusedLAMB(groups, lr=lr, max_grad_norm=math.inf)  # --clip-norm is the one that clips
    except (ImportError, RuntimeError) as error:  # RuntimeError: built without its CUDA extensions
        raise UserError(
            f"--optimizer lamb needs NVIDIA's apex, built for a GPU from github.com/NVIDIA/apex (the package of that "
            f"name on the index is another one): {error}; lars and adamw need nothing"
        ) from None


def take_step(optimizer: torch.optim.Optimizer, good: Tensor) -> None:
    """Update the weights and the optimizer's state where `good` (0-dim bool) is true, and change nothing otherwise.

    torch's fused optimizers read the flag on the device (as GradScaler has them do); for others the host waits for it.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~good).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(good):
        optimizer.step()


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
