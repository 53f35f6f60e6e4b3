"""The few things ranks do together. On one process each of them is the identity and costs nothing."""

from __future__ import annotations

import datetime
import os
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from fasttrain.cli import UserError

TIMEOUT = datetime.timedelta(minutes=10)  # a rank that waits longer for another gives up with an error


class Ranks:
    """This process's place among all: rank, world_size, its device, and how many of the machine's cores it may use."""

    def __init__(self, device: str) -> None:
        """Join the group torchrun describes (gloo on CPU, NCCL on GPU), or be alone.

        Raises UserError when `device` ("auto", "cpu", "cuda") is not there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no GPU is visible to PyTorch here; use --device cpu or auto")
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        self._control: Any = None
        self._pending: tuple[Any, Tensor] | None = None
        self.cores = max(1, len(psutil.Process().cpu_affinity() or [0]) // local_world_size)
        if on_gpu:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(self.cores)  # torch's own choice leaves out hyper-threads: 1.6x slower on two of them
        if self.world_size > 1:
            backend = "cuda:nccl,cpu:gloo" if on_gpu else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT)
            self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)  # flags cross it without a GPU sync

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, flag: int) -> int:
        """The largest `flag` any rank passed one call ago (on one process: this one's, now).

        Asynchronous: the answer to this call is read at the next, so no rank waits for another here, and all ranks
        get the same answer at the same step.
        """
        if self.world_size == 1:
            return flag
        answer = 0
        if self._pending is not None:
            work, value = self._pending
            work.wait()
            answer = int(value)
        value = torch.tensor(flag)
        self._pending = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._control, async_op=True), value
        return answer

    def share(self, value: object) -> object:
        """Rank 0's `value`, on every rank (any object that pickles)."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.world_size > 1:
            dist.barrier(group=self._control)

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(x_ND: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (W·N, D), without gradient. Every rank must hold the same N."""
    if world_size() == 1:
        return x_ND.detach()
    out_MD = x_ND.new_empty(world_size() * x_ND.shape[0], x_ND.shape[1])
    dist.all_gather_into_tensor(out_MD, x_ND.detach().contiguous())
    return out_MD


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        # Every rank computes the same loss of the same sum, so this is that loss's whole gradient for its own part;
        # times W because DDP then divides the sum over ranks by W.
        return grad * world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' x, differentiable, for a loss that every rank computes alike over the global batch."""
    return x if world_size() == 1 else _SumOverRanks.apply(x)
