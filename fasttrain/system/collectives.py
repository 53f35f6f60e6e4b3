"""What a loss needs of the other ranks' rows. On one process each is the identity and costs nothing."""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttrain.system.cores import machine_size
from fasttrain.system.errors import UserError

TIMEOUT = datetime.timedelta(minutes=10)  # a rank that waits longer for another gives up with an error


class Peers:
    """Ranks that do something together. A copy of what holds it means the same ranks."""

    def __init__(self, group: Any = None) -> None:  # noqa: ANN401 torch has no public name for its type
        """group: of torch.distributed; None: all ranks."""
        self.group = group

    def __deepcopy__(self, _memo: dict) -> Peers:
        return self

    def __len__(self) -> int:
        return dist.get_world_size(self.group)


ALL = Peers()


def of_machine() -> Peers:
    """The ranks of this machine. Every rank must ask for them. Raises UserError where their launcher does not say which
    these are, machines have different numbers of ranks, or those of one are not numbered in a row."""
    return _of_machine(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _of_machine(_all: Any) -> Peers:  # noqa: ANN401 as above
    # Not by names of hosts: containers of one machine may have several, and machines the same.
    own = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("LOCAL_RANK")
    place_W: list[Any] = [None] * world_size()
    dist.all_gather_object(place_W, own)
    if any(None in place for place in place_W):
        raise UserError("LOCAL_WORLD_SIZE and LOCAL_RANK do not say which processes are of one machine: use torchrun")
    size = machine_size()
    sizes = sorted({int(number) for number, _ in place_W})
    if len(sizes) > 1 or world_size() % size:
        raise UserError(f"the {world_size()} processes are not equally many on each machine: {sizes}")
    if any(int(place) != rank % size for rank, (_, place) in enumerate(place_W)):
        raise UserError(f"the processes of a machine are not numbered in a row: LOCAL_RANK is not RANK modulo {size}")
    return Peers(dist.new_subgroups(size, timeout=TIMEOUT)[0])


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


# For what all ranks must draw alike: whoever draws from it does so on every rank. train.py seeds it at every step, so
# that it has no state to save.
common_generator = torch.Generator()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """What is on the CPU, such as what was drawn there, on a device: from pinned memory, so that the host does not wait
    for the copy."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


# their names until torch 2.13
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_rows(x_ND: Tensor, peers: Peers = ALL) -> Tensor:
    """Rows of all peers in rank order, (W·N, D), differentiable. Every rank must hold the same N.

    For losses that each rank takes over its own rows against all: DDP's mean over the ranks is then the gradient of the
    mean of their losses.
    """
    return x_ND if world_size() == 1 else _GatherRows.apply(x_ND, peers)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, peers: Peers) -> Tensor:  # type: ignore[override] # noqa: ANN401 torch's own
        ctx.peers = peers
        out_MD = x_ND.new_empty(len(peers) * x_ND.shape[0], x_ND.shape[1])
        all_gather_single(out_MD, x_ND.contiguous(), group=peers.group)
        return out_MD

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override] # noqa: ANN401
        grad_ND = grad_MD.new_empty(len(grad_MD) // len(ctx.peers), grad_MD.shape[1])
        # every rank's loss has a part in each row's gradient
        reduce_scatter_single(grad_ND, grad_MD.contiguous(), group=ctx.peers.group)
        return grad_ND, None


def exchange_rows(x: Tensor, send_W: list[int], receive_W: list[int]) -> Callable[[], Tensor]:
    """Send the first send_W[0] rows of x (N, …) to rank 0, the next to rank 1, and so on; without gradient.

    They are on their way when it returns. What it returns waits for those that come, and gives them in rank order.
    receive_W: how many rows come from each rank, which every rank must know.
    """
    sent = x.detach().contiguous()
    if world_size() == 1:
        return lambda: sent
    out = x.new_empty(sum(receive_W), *x.shape[1:])
    work: Any = dist.all_to_all_single(out, sent, receive_W, send_W, async_op=True)
    return functools.partial(_received, work, sent, out)


def _received(work: Any, _sent: Tensor, out: Tensor) -> Tensor:  # noqa: ANN401 a Work, or nothing
    """_sent is held until it has left."""
    work.wait()
    return out


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


def max_over_ranks(x: Tensor) -> Tensor:
    """The largest of all ranks' x, element by element, without gradient."""
    largest = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def first_row(count: int) -> int:
    """Where this rank's rows begin among the gathered rows of all ranks, each of which holds `count`."""
    return rank() * count


def own_rows(count: int) -> slice:
    """Where this rank's rows lie among the gathered rows of all ranks, each of which holds `count`."""
    return slice(rank() * count, (rank() + 1) * count)
