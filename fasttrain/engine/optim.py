"""Optimizers and the learning-rate schedule.

A step whose gradients are not finite must change nothing. The fused optimizers of torch decide that on the device, so
the host need not wait for the gradients: see take_step.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.engine.lamb import LAMB
from fasttrain.engine.options import OptimisationOptions, warmup_that_fits

TINY = 1e-30  # a learning rate of 0 at the very end
MOMENTUM = 0.9  # of SGD and LARS, in every recipe that the presets follow


def make_optimizer(
    options: OptimisationOptions, module: nn.Module, steady: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer of the parameters that take gradients.

    steady: names of networks in the module whose learning rate stays at its peak. LAMB is apex's on a GPU where that is
    installed.
    """
    groups = _groups(options, module, steady)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.peak_lr, fused=True)
    if options.optimizer == "lamb":
        on_gpu = groups[0]["params"][0].is_cuda
        return (on_gpu and _apex_lamb(groups, options.peak_lr)) or LAMB(groups, options.peak_lr)
    if options.optimizer == "lars":
        optimizer: torch.optim.Optimizer = LARS(groups, options.peak_lr, options.trust, options.trust_clip)
    else:
        optimizer = torch.optim.SGD(groups, lr=options.peak_lr, momentum=MOMENTUM, fused=True)
    for p in (p for group in groups for p in group["params"]):
        # else torch leaves them uninitialised where the very first step is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _groups(options: OptimisationOptions, module: nn.Module, steady: Sequence[str]) -> list[dict[str, Any]]:
    """Parameters of the same weight decay and schedule, those of two dimensions or more first."""
    decay_all = options.decay == "all" or (options.decay == "auto" and options.optimizer == "sgd")
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            vector = p.dim() <= 1
            key = name.split(".")[0] in steady, vector and options.vector_lr != 1, vector and not decay_all
            groups.setdefault(key, []).append(p)
    return [
        {
            "params": groups[key], "weight_decay": 0.0 if key[2] else options.weight_decay, "decays": not key[2],
            "steady": key[0], "lr_factor": options.vector_lr if key[1] else 1.0,
        }
        for key in sorted(groups)
    ]  # fmt: skip


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888, algorithm 1), as MoCo v3 uses it.

    g ← (g + β·w) · η·‖w‖ / ‖g + β·w‖  for every matrix or kernel w of weight decay β; then SGD with momentum.
    Parameters of one dimension are not scaled. Where a norm is 0 the factor is 1. Here β is a group's "decay".
    Clipped (LARC, as in NVIDIA's apex), the factor is divided by the learning rate and at most 1.
    """

    def __init__(self, groups: list[dict], lr: float, trust: float, clipped: bool) -> None:
        """groups: parameters with their "weight_decay"; trust: η. Gradients are scaled in place by step()."""
        self._trust, self._clipped = trust, clipped
        renamed = [{"decay" if name == "weight_decay" else name: group[name] for name in group} for group in groups]
        super().__init__(renamed, lr=lr, momentum=MOMENTUM, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights and group["decay"]:
                torch._foreach_add_([p.grad for p in weights], weights, alpha=group["decay"])
            matrices = [p for p in weights if p.dim() > 1]
            if matrices:
                _scale_by_trust(
                    [p.grad for p in matrices], matrices, self._trust, group["lr"] if self._clipped else None
                )
        super().step()


def _scale_by_trust(gradients: list[Tensor], weights: list[Tensor], trust: float, clip_at: float | None) -> None:
    weight_norm_P = torch.stack(torch._foreach_norm(weights))
    gradient_norm_P = torch.stack(torch._foreach_norm(gradients))
    ratio_P = trust * weight_norm_P / gradient_norm_P
    if clip_at is not None:
        ratio_P = (ratio_P / max(clip_at, TINY)).clamp(max=1)
    ratio_P = torch.where((weight_norm_P > 0) & (gradient_norm_P > 0), ratio_P, 1.0)
    torch._foreach_mul_(gradients, list(ratio_P.unbind()))


def _apex_lamb(groups: list[dict], lr: float) -> torch.optim.Optimizer | None:
    """NVIDIA's, built from github.com/NVIDIA/apex (the package of that name on the index is another one)."""
    try:
        from apex.optimizers import FusedLAMB

        return FusedLAMB(groups, lr=lr, max_grad_norm=math.inf)  # --clip-norm is the one that clips
    except (ImportError, RuntimeError):  # RuntimeError: built without its CUDA extensions
        return None


def take_step(optimizer: torch.optim.Optimizer, good: Tensor) -> None:
    """Update the weights and the optimizer's state where `good` (0-dim bool) is true, and change nothing otherwise.

    torch's fused optimizers read the flag on the device (as GradScaler has them do); for others the host waits for it.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~good).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(good):
        optimizer.step()


class Rates(NamedTuple):
    """What a schedule gives a step."""

    lr: float
    steady_lr: float  # of networks whose learning rate stays at its peak
    weight_decay: float


class Schedule:
    """Learning rate and weight decay: pure functions of the step, so that there is no state to save.

    A run that is extended begins them anew with each extension, at their peaks of before.
    """

    def __init__(self, options: OptimisationOptions, steps_per_epoch: int, extend: Sequence[int] = ()) -> None:
        """extend: the epochs of each extension."""
        self._options, self._steps_per_epoch = options, steps_per_epoch
        self._parts = (options.epochs, *extend)  # each with a warm-up and a cosine of its own
        self._ends = list(itertools.accumulate(self._parts))
        self.total_steps = self._ends[-1] * steps_per_epoch

    def _part(self, step: int) -> int:
        return min(bisect.bisect_right(self._ends, step // self._steps_per_epoch), len(self._parts) - 1)

    def epochs(self, step: int) -> int:
        """Those of the run until the extension after this step, or its end."""
        return self._ends[self._part(step)]

    def __call__(self, step: int) -> Rates:
        options, peak, part = self._options, self._options.peak_lr, self._part(step)
        epochs = self._parts[part]
        place = step - (self._ends[part] - epochs) * self._steps_per_epoch
        total_steps = epochs * self._steps_per_epoch
        warmup_steps = int(warmup_that_fits(options.warmup_epochs, epochs) * self._steps_per_epoch)
        lr = learning_rate(place, total_steps, warmup_steps, peak, options.final_lr)
        steady_lr = peak * min(1.0, (place + 1) / max(1, warmup_steps))
        end = options.weight_decay if options.weight_decay_end is None else options.weight_decay_end
        return Rates(lr, steady_lr, end + (options.weight_decay - end) * half_cosine(place / total_steps))


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, final: float = 0.0) -> float:
    """Linear warm-up to `peak`, then half a cosine down to final · peak at total_steps (SGDR, arXiv 1608.03983, without
    restarts)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (final + (1 - final) * half_cosine((step - warmup_steps) / max(1, total_steps - warmup_steps)))


def half_cosine(part: float) -> float:
    """From 1 at 0 down to 0 at 1, and from there on."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    for group in optimizer.param_groups:
        group["lr"] = (rates.steady_lr if group["steady"] else rates.lr) * group["lr_factor"]
        group["decay" if "decay" in group else "weight_decay"] = rates.weight_decay if group["decays"] else 0.0
