"""What the tests of the kernels over similarities share: their versions, rows, and plain torch to compare with."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.kernels.similarity import reference

ON_GPU = torch.cuda.is_available()
# Triton's interpreter multiplies bf16 wrongly, so that dtype is left to a GPU.
VERSIONS = [("cpu", torch.float32), ("cpu", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)]
VERSIONS += [("triton", torch.bfloat16)] if ON_GPU else []
SLACK = 4  # times the error that plain operations of the same dtype make


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" and ON_GPU else "cpu"


def rows(count: int, dim: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)
    return x.to(device=device, dtype=dtype)


def plain(
    x: torch.Tensor, queue: torch.Tensor, temperature: torch.Tensor, own: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse and O as eager torch computes them in the dtype given."""
    s = x @ queue.T / temperature.to(x.dtype)[:, None]
    if own is not None:
        s = s.masked_fill(reference._own(len(x), len(queue), own, x.device), -math.inf)
    return s.logsumexp(1), s.softmax(1) @ queue


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has that an operation within returns."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out
