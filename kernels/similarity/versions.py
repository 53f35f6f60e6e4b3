"""The versions of the kernels over similarities, by the names that `impl` takes, and what they ask of their tensors."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fasttrain.kernels.similarity import cpu

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
MAX_WIDTH = 256  # of the Triton version: a row of queries and one of accumulators must fit into registers


def implementation(impl: str, x_RD: Tensor) -> str:
    """What stands for `impl` where the rows are these: one of IMPLEMENTATIONS, not "auto". Raises ValueError."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; choose from: {', '.join(IMPLEMENTATIONS)}")
    on_cpu = x_RD.device.type == "cpu"
    fits = x_RD.shape[-1] <= MAX_WIDTH and x_RD.dtype != torch.float64
    if impl == "auto":
        return "cpu" if on_cpu else "triton" if fits and x_RD.device.type == "cuda" else "reference"
    if impl == "cpu" and not on_cpu:
        raise ValueError(
            f"impl 'cpu' is unavailable for tensors on {x_RD.device}; choose from: auto, reference, triton"
        )
    if impl == "triton":
        from fasttrain.kernels.similarity import gpu

        if not fits or (on_cpu and not gpu.INTERPRETED):
            what = f"{x_RD.dtype} tensors of width {x_RD.shape[-1]} on {x_RD.device}"
            raise ValueError(f"impl 'triton' is unavailable for {what}; choose from: auto, reference, cpu")
    return impl


def check(x_RD: Tensor, queue_KD: Tensor, own: int | None = None) -> None:
    """Raises ValueError for rows, a queue and a first own key that do not go together."""
    if x_RD.dim() != 2 or queue_KD.dim() != 2 or x_RD.shape[1] != queue_KD.shape[1] or x_RD.dtype != queue_KD.dtype:
        shapes = f"{tuple(x_RD.shape)} {x_RD.dtype} and {tuple(queue_KD.shape)} {queue_KD.dtype}"
        raise ValueError(f"rows and queue must be (R, D) and (K, D) of one dtype, not {shapes}")
    if queue_KD.shape[0] < (1 if own is None else 2):
        raise ValueError(f"a queue of {queue_KD.shape[0]} rows leaves none to compare with")
    if own is not None and not 0 <= own <= queue_KD.shape[0] - x_RD.shape[0]:
        raise ValueError(f"own {own} puts a row's own key outside the queue's {queue_KD.shape[0]} rows")


def version(impl: str) -> ModuleType:
    """The module behind an impl's name. Triton is imported on demand: it is slow to import and not always there."""
    if impl == "cpu":
        return cpu
    from fasttrain.kernels.similarity import gpu

    return gpu
