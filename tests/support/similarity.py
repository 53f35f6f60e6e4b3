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
    s = _similarities(x, queue, temperature, own)
    return s.logsumexp(1), s.softmax(1) @ queue


def assert_maximum(
    maximum: torch.Tensor, x: torch.Tensor, keys: torch.Tensor, temperature: torch.Tensor, own: int | None
) -> None:
    """Holds the largest similarities to fp64. Products of 16 bits are exact in fp32, whose sums alone are rounded."""
    s = _similarities(x.double(), keys.double(), temperature.double(), own)
    assert maximum.dtype == torch.promote_types(x.dtype, torch.float32)
    assert not maximum.requires_grad
    allowed = 8 * torch.finfo(maximum.dtype).eps * (1 / temperature.double()).max()
    assert (maximum.double() - s.amax(1)).abs().max() <= allowed


def _similarities(x: torch.Tensor, keys: torch.Tensor, temperature: torch.Tensor, own: int | None) -> torch.Tensor:
    s = x @ keys.T / temperature.to(x.dtype)[:, None]
    return s if own is None else s.masked_fill(reference._own(len(x), len(keys), own, x.device), -math.inf)


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
