"""One training step: forward and backward of its micro-batches, then the update. The host waits for none of it.

A step whose gradients are not finite is skipped: weights, optimizer, momentum encoder, queue and running statistics
stay as they were. That is decided on the device, from the gradients all ranks share, so they agree.
"""

from __future__ import annotations

import contextlib
import shutil

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasttrain.config import TrainConfig
from fasttrain.engine.optim import make_optimizer, set_learning_rate, take_step
from fasttrain.engine.ranks import Ranks, data_parallel
from fasttrain.engine.skips import Skips
from fasttrain.kernels.augment import Views
from fasttrain.methods import AUTOCAST, Method
from fasttrain.networks.batch_norm import RunningStatistics
from fasttrain.system.errors import UserError


class TrainStep:
    """Makes the step of a method. It owns the optimizer and the loss scale, and counts what it skips."""

    def __init__(self, method: Method, config: TrainConfig, ranks: Ranks) -> None:
        """method: on the ranks' device. Raises UserError for a missing optimizer package."""
        self.optimizer = make_optimizer(config.optimizer, method, config.lr, config.weight_decay)
        self.skips_3 = torch.tensor(Skips(), device=ranks.device)  # never read by the host here
        self._method, self._model = method, data_parallel(method, static_graph=config.accumulate == 1)
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
        self._autocast = ranks.device.type, AUTOCAST.get(config.precision)
        self._accumulate, self._clip_norm, self._cuda_graph = config.accumulate, config.clip_norm, config.cuda_graph
        self._statistics = RunningStatistics(method)

    def __call__(self, views: Views, step: int, lr: float) -> dict[str, Tensor]:
        """This rank's views (V, B, 3, S, S) of each size → its loss terms on the device, means over micro-batches."""
        if self._cuda_graph:
            torch.compiler.cudagraph_mark_step_begin()
        self._statistics.save()
        parts = list(zip(*(group.chunk(self._accumulate, dim=1) for group in views), strict=True))
        terms = [self._forward_backward(part, last=i == len(parts) - 1) for i, part in enumerate(parts)]

        self._scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        good = norm.isfinite()
        if self._clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        set_learning_rate(self.optimizer, lr)
        take_step(self.optimizer, good)
        self._scaler.update()
        self.optimizer.zero_grad()
        self._statistics.keep_if(good)
        self._method.after_step(good)

        total, in_a_row, last = self.skips_3.unbind()
        bad = (~good).long()
        self.skips_3 = torch.stack([total + bad, (in_a_row + 1) * bad, torch.where(good, last, step)])
        return terms[0] if len(terms) == 1 else {n: torch.stack([t[n] for t in terms]).mean() for n in terms[0]}

    def _forward_backward(self, views: Views, last: bool) -> dict[str, Tensor]:
        """Add a micro-batch's gradients to those before it; the last one's backward sums them over the ranks."""
        wait = isinstance(self._model, DistributedDataParallel) and not last
        kind, dtype = self._autocast
        with self._model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
            with torch.autocast(kind, dtype, enabled=dtype is not None):
                loss, terms = self._model(views)
            self._scaler.scale(loss / self._accumulate).backward()
        return terms

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict(), "skips": self.skips_3}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.skips_3 = state["skips"].to(self.skips_3.device)


def compile_networks(method: Method, config: TrainConfig, device: torch.device) -> None:
    """torch.compile a method's networks in place: the names in its state stay as they are.

    --compile auto does so on a GPU where there is the C compiler that Triton needs. An encoder that recomputes its
    activations is left as it is: its stages run twice under different conditions.
    Raises UserError for --cuda-graph where it can't be.
    """
    compiler = any(map(shutil.which, ("g++", "clang++") if device.type == "cpu" else ("cc", "gcc", "clang")))
    if config.compile == "on" and not compiler:
        raise UserError("--compile on needs a C++ compiler on a CPU (g++), and a C compiler on a GPU (gcc)")
    wanted = config.compile == "on" or (config.compile == "auto" and device.type == "cuda" and compiler)
    if config.cuda_graph and (device.type != "cuda" or not wanted or config.accumulate > 1):
        raise UserError("--cuda-graph needs a GPU, --compile on or auto (with a C compiler), and --accumulate 1")
    if wanted:  # every network, at every size of views (--resolution), counts towards one limit; beyond it runs eagerly
        torch._dynamo.config.recompile_limit = 64
    for name, network in method.named_children():
        recomputed = config.checkpoint_activations and name == "encoder"
        if wanted and not recomputed and any(p.dim() > 1 for p in network.parameters()):
            network.compile(dynamic=False, mode="reduce-overhead" if config.cuda_graph else None)
