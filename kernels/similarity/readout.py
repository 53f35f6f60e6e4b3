"""The one primitive of every loss over a queue: each row's log-sum-exp over the queue, and its softmax average of it.

It is attention with the queue as keys and as values. Since the queue takes no gradient, a loss that depends on its rows
through the log-sum-exp alone needs no second pass over the queue in its backward: d lse_i / d x_i = O_i / τ.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fasttrain.kernels.autograd import Context
from fasttrain.kernels.similarity import cpu, reference

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
MAX_WIDTH = 256  # of the Triton version: a row of queries and one of accumulators must fit into registers


def readout(
    x_RD: Tensor, queue_KD: Tensor, temperature: float | Tensor, *, own: int | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """lse_i = log Σ_j exp(x_i·Q_j/τ_i) and O_i = Σ_j softmax_j(x_i·Q_j/τ_i) Q_j, without an R×K matrix.

    x_RD: (R, D), queue_KD: (K, D), K ≥ 1, of one dtype: fp32, bf16, fp16 or fp64; temperature: one number > 0 for all
    rows, or a tensor () or (R,), so that sides with different temperatures may be stacked and read the queue once. own:
    where given, row i leaves out queue row own + i (K ≥ 2).

    impl: "reference" materialises R×K; "cpu" (CPU tensors) holds one bounded tile of it; "triton" (GPU tensors of up to
    256 columns and 32 bits, or CPU tensors in Triton's interpreter) never writes it to memory; "auto" is "cpu" on a
    CPU, "triton" on a GPU where it can, "reference" otherwise. Products of fp32 on a GPU are exact fp32 where
    torch.get_float32_matmul_precision() is "highest", else three products in tf32.

    Returns lse (R,) and O (R, D) in fp32 (fp64 for fp64), differentiable in x and in a temperature tensor, not in the
    queue. A gradient of O costs a second pass over the queue, a gradient of lse none. The result is the same from run
    to run. Raises ValueError for shapes, dtypes and an impl that do not fit.
    """
    chosen = _implementation(impl, x_RD, queue_KD)
    _check(x_RD, queue_KD, own)
    accumulate = torch.promote_types(x_RD.dtype, torch.float32)
    if isinstance(temperature, (int, float)):  # filled on the device: a copy from the host would wait for it
        temperature = torch.full((), temperature, dtype=accumulate, device=x_RD.device)
    if temperature.shape not in ((), x_RD.shape[:1]):
        raise ValueError(f"temperature has shape {tuple(temperature.shape)}; it must be () or ({x_RD.shape[0]},)")
    temperature_R = temperature.to(accumulate).expand(x_RD.shape[0])
    if chosen == "reference":
        return reference.readout(x_RD.to(accumulate), queue_KD.detach().to(accumulate), temperature_R, own)
    return _readout(x_RD, queue_KD.detach(), temperature_R, -1 if own is None else own, chosen)


def _implementation(impl: str, x_RD: Tensor, queue_KD: Tensor) -> str:
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


def _check(x_RD: Tensor, queue_KD: Tensor, own: int | None) -> None:
    if x_RD.dim() != 2 or queue_KD.dim() != 2 or x_RD.shape[1] != queue_KD.shape[1] or x_RD.dtype != queue_KD.dtype:
        shapes = f"{tuple(x_RD.shape)} {x_RD.dtype} and {tuple(queue_KD.shape)} {queue_KD.dtype}"
        raise ValueError(f"rows and queue must be (R, D) and (K, D) of one dtype, not {shapes}")
    if queue_KD.shape[0] < (1 if own is None else 2):
        raise ValueError(f"a queue of {queue_KD.shape[0]} rows leaves none to compare with")
    if own is not None and not 0 <= own <= queue_KD.shape[0] - x_RD.shape[0]:
        raise ValueError(f"own {own} puts a row's own key outside the queue's {queue_KD.shape[0]} rows")


def _version(impl: str) -> ModuleType:
    """The module behind an impl's name. Triton is imported on demand: it is slow to import and not always there."""
    if impl == "cpu":
        return cpu
    from fasttrain.kernels.similarity import gpu

    return gpu


@torch.library.custom_op("fasttrain::readout", mutates_args=())
def _readout(x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int, impl: str) -> tuple[Tensor, Tensor]:
    """own: -1 for none."""
    return _version(impl).readout(x_RD.contiguous(), queue_KD.contiguous(), temperature_R, own)


@_readout.register_fake
def _(x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int, impl: str) -> tuple[Tensor, Tensor]:
    return temperature_R.new_empty(x_RD.shape[0]), temperature_R.new_empty(x_RD.shape)


@torch.library.custom_op("fasttrain::readout_backward", mutates_args=())
def _readout_backward(
    x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int, impl: str, lse_R: Tensor, out_RD: Tensor,
    grad_out_RD: Tensor,
) -> Tensor:  # fmt: skip
    """Σ_j p_ij (g_i·Q_j − g_i·O_i) Q_j / τ_i: what the gradient g of O adds to x's."""
    contiguous = x_RD.contiguous(), queue_KD.contiguous(), temperature_R, own
    return _version(impl).readout_backward(*contiguous, lse_R, out_RD, grad_out_RD.contiguous())


@_readout_backward.register_fake
def _(
    x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int, impl: str, lse_R: Tensor, out_RD: Tensor,
    grad_out_RD: Tensor,
) -> Tensor:  # fmt: skip
    return torch.empty_like(out_RD)


def _setup(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x_RD, queue_KD, temperature_R, ctx.own, ctx.impl = inputs
    ctx.save_for_backward(x_RD, queue_KD, temperature_R, *output)
    ctx.set_materialize_grads(False)  # so that an unused O is seen as such


def _backward(ctx: Context, grad_lse_R: Tensor | None, grad_out_RD: Tensor | None) -> tuple[Tensor | None, ...]:
    """Everything is a function of x_i/τ_i, so the gradient of τ_i is −x_i·(gradient of x_i)/τ_i."""
    x_RD, queue_KD, temperature_R, lse_R, out_RD = ctx.saved_tensors
    grad_RD = torch.zeros_like(out_RD)
    if grad_lse_R is not None:
        grad_RD = (grad_lse_R / temperature_R)[:, None] * out_RD
    if grad_out_RD is not None:
        grad_RD = grad_RD + _readout_backward(
            x_RD, queue_KD, temperature_R, ctx.own, ctx.impl, lse_R, out_RD, grad_out_RD
        )
    grad_temperature_R = None
    if ctx.needs_input_grad[2]:
        grad_temperature_R = -(x_RD.to(grad_RD.dtype) * grad_RD).sum(1) / temperature_R
    return grad_RD.to(x_RD.dtype), None, grad_temperature_R, None, None


_readout.register_autograd(_backward, setup_context=_setup)
