"""Each row's log-sum-exp of its similarities to keys, and its softmax average of the keys.

It is attention with the queue as keys and as values. A loss that depends on its rows through the log-sum-exp alone
needs no second pass over the keys for their gradient: d lse_i / d x_i = O_i / τ. The keys' own gradient is one more
pass: d lse_i / d y_j = p_ij x_i / τ, where p_ij = exp(x_i·y_j/τ − lse_i) needs the lse of the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.kernels.autograd import Context
from fasttrain.kernels.similarity import cpu, reference
from fasttrain.kernels.similarity.versions import check, implementation, version


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
    queue (`log_sum_exp` is). A gradient of O costs a second pass over the queue, a gradient of lse none. The result is
    the same from run to run. Raises ValueError for shapes, dtypes and an impl that do not fit.
    """
    return _read(x_RD, queue_KD, temperature, own, impl, maximum=False)[:2]


def readout_with_maximum(
    x_RD: Tensor, queue_KD: Tensor, temperature: float | Tensor, *, own: int | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """lse and O as of `readout`, and m_i = max_j x_i·Q_j/τ_i (R,) of the same pass, in the dtype of lse.

    m is without gradient. Times τ_i it is the similarity of the nearest key.
    """
    return _read(x_RD, queue_KD, temperature, own, impl, maximum=True)


def log_sum_exp(
    x_RD: Tensor, keys_KD: Tensor, temperature: float | Tensor, *, own: int | None = None, impl: str = "auto"
) -> Tensor:
    """lse_i = log Σ_j exp(x_i·y_j/τ_i) as of `readout`, which says more of the arguments, differentiable in the keys y.

    Returns lse (R,). The gradient of x (and of a temperature tensor) is from O, which the forward makes where one of
    them takes a gradient. The gradient of the keys costs one more pass, in the backward. Where both sides are one
    tensor, with one temperature and own 0 or None, the "cpu" version computes half of the similarities, for both.
    Elsewhere on a CPU "auto" is "reference" where R×K is no larger than the tile that "cpu" would hold.
    """
    return _log_sum_exp(x_RD, keys_KD, temperature, own, impl, maximum=False)[0]


def log_sum_exp_with_maximum(
    x_RD: Tensor, keys_KD: Tensor, temperature: float | Tensor, *, own: int | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """lse as of `log_sum_exp`, and m as of `readout_with_maximum`, of the same pass."""
    return _log_sum_exp(x_RD, keys_KD, temperature, own, impl, maximum=True)


def _read(
    x_RD: Tensor, queue_KD: Tensor, temperature: float | Tensor, own: int | None, impl: str, maximum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Without `maximum` there need be none: where it is no part of the pass it takes time."""
    temperature_R, chosen = _checked(x_RD, queue_KD, temperature, own, impl)
    queue_KD = queue_KD.detach()
    if chosen == "reference":
        dtype = temperature_R.dtype
        return reference.readout(x_RD.to(dtype), queue_KD.to(dtype), temperature_R, own, maximum)
    lse_R, out_RD, maximum_R = _readout(x_RD, queue_KD, temperature_R, -1 if own is None else own, True, chosen)
    return lse_R, out_RD, maximum_R.detach()


def _log_sum_exp(
    x_RD: Tensor, keys_KD: Tensor, temperature: float | Tensor, own: int | None, impl: str, maximum: bool
) -> tuple[Tensor, Tensor]:
    temperature_R, chosen = _checked(x_RD, keys_KD, temperature, own, impl)
    one_temperature = not isinstance(temperature, Tensor) or temperature.dim() == 0
    if chosen == "cpu" and keys_KD is x_RD and not own and one_temperature:
        lse_R, maximum_R = _symmetric(x_RD, temperature_R[0], own == 0)
        return lse_R, maximum_R.detach()
    if chosen == "reference" or (impl == "auto" and chosen == "cpu" and cpu.in_one_tile(x_RD, keys_KD)):
        dtype = temperature_R.dtype
        return reference.log_sum_exp(x_RD.to(dtype), keys_KD.to(dtype), temperature_R, own, maximum)
    average = torch.is_grad_enabled() and (x_RD.requires_grad or temperature_R.requires_grad)
    lse_R, _, maximum_R = _readout(x_RD, keys_KD, temperature_R, -1 if own is None else own, average, chosen)
    return lse_R, maximum_R.detach()


def _checked(
    x_RD: Tensor, keys_KD: Tensor, temperature: float | Tensor, own: int | None, impl: str
) -> tuple[Tensor, str]:
    """The rows' temperatures in the dtype that sums have, and the version that is chosen."""
    chosen = implementation(impl, x_RD)
    check(x_RD, keys_KD, own)
    accumulate = torch.promote_types(x_RD.dtype, torch.float32)
    if isinstance(temperature, (int, float)):  # filled on the device: a copy from the host would wait for it
        temperature = torch.full((), temperature, dtype=accumulate, device=x_RD.device)
    if temperature.shape not in ((), x_RD.shape[:1]):
        raise ValueError(f"temperature has shape {tuple(temperature.shape)}; it must be () or ({x_RD.shape[0]},)")
    return temperature.to(accumulate).expand(x_RD.shape[0]), chosen


@torch.library.custom_op("fasttrain::readout", mutates_args=())
def _readout(
    x_RD: Tensor, keys_KD: Tensor, temperature_R: Tensor, own: int, average: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """own: -1 for none. Without `average` O has no rows, and neither x nor temperature may need a gradient.

    The maximum, which comes third, has none.
    """
    return version(impl).readout(x_RD.contiguous(), keys_KD.contiguous(), temperature_R, own, average)


@_readout.register_fake
def _(
    x_RD: Tensor, keys_KD: Tensor, temperature_R: Tensor, own: int, average: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim = x_RD.shape
    shapes = (rows,), (rows if average else 0, dim), (rows,)
    lse_R, out_RD, maximum_R = (temperature_R.new_empty(shape) for shape in shapes)
    return lse_R, out_RD, maximum_R


@torch.library.custom_op("fasttrain::readout_backward", mutates_args=())
def _readout_backward(
    x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int, impl: str, lse_R: Tensor, out_RD: Tensor,
    grad_out_RD: Tensor,
) -> Tensor:  # fmt: skip
    """Σ_j p_ij (g_i·Q_j − g_i·O_i) Q_j / τ_i: what the gradient g of O adds to x's."""
    contiguous = x_RD.contiguous(), queue_KD.contiguous(), temperature_R, own
    return version(impl).readout_backward(*contiguous, lse_R, out_RD, grad_out_RD.contiguous())


@_readout_backward.register_fake
def _(
    x_RD: Tensor, queue_KD: Tensor, temperature_R: Tensor, own: int, impl: str, lse_R: Tensor, out_RD: Tensor,
    grad_out_RD: Tensor,
) -> Tensor:  # fmt: skip
    return torch.empty_like(out_RD)


@torch.library.custom_op("fasttrain::keys_backward", mutates_args=())
def _keys_backward(
    x_RD: Tensor, keys_KD: Tensor, temperature_R: Tensor, own: int, impl: str, lse_R: Tensor, weight_R: Tensor
) -> Tensor:
    """Σ_i weight_i p_ij x_i: the gradient of the keys, where weight_i is lse_i's over τ_i."""
    contiguous = x_RD.contiguous(), keys_KD.contiguous(), temperature_R, own
    return version(impl).keys_backward(*contiguous, lse_R, weight_R.contiguous())


@_keys_backward.register_fake
def _(
    x_RD: Tensor, keys_KD: Tensor, temperature_R: Tensor, own: int, impl: str, lse_R: Tensor, weight_R: Tensor
) -> Tensor:
    return temperature_R.new_empty(keys_KD.shape)


def _setup(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_RD, keys_KD, temperature_R, ctx.own, _, ctx.impl = inputs
    ctx.save_for_backward(x_RD, keys_KD, temperature_R, *output[:2])
    ctx.set_materialize_grads(False)  # so that an unused O is seen as such


def _backward(
    ctx: Context, grad_lse_R: Tensor | None, grad_out_RD: Tensor | None, _maximum: None
) -> tuple[Tensor | None, ...]:
    x_RD, keys_KD, temperature_R, lse_R, out_RD = ctx.saved_tensors
    tiles = x_RD, keys_KD, temperature_R, ctx.own, ctx.impl, lse_R
    grad_x_RD = grad_keys_KD = grad_temperature_R = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        grad_RD = torch.zeros_like(out_RD)
        if grad_lse_R is not None:
            grad_RD = (grad_lse_R / temperature_R)[:, None] * out_RD
        if grad_out_RD is not None:
            grad_RD = grad_RD + _readout_backward(*tiles, out_RD, grad_out_RD)
        grad_x_RD = grad_RD.to(x_RD.dtype)
        # Everything is a function of x_i/τ_i, so the gradient of τ_i is −x_i·(gradient of x_i)/τ_i.
        if ctx.needs_input_grad[2]:
            grad_temperature_R = -(x_RD.to(grad_RD.dtype) * grad_RD).sum(1) / temperature_R
    if ctx.needs_input_grad[1] and grad_lse_R is not None:
        grad_keys_KD = _keys_backward(*tiles, grad_lse_R / temperature_R).to(keys_KD.dtype)
    return grad_x_RD, grad_keys_KD, grad_temperature_R, None, None, None


_readout.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("fasttrain::symmetric_log_sum_exp", mutates_args=())
def _symmetric(x_RD: Tensor, temperature: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """lse and maximum of the rows among themselves, on a CPU; if `own`, each leaves itself out."""
    return cpu.symmetric(x_RD, temperature, own)


@_symmetric.register_fake
def _(x_RD: Tensor, temperature: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    return temperature.new_empty(x_RD.shape[0]), temperature.new_empty(x_RD.shape[0])


@torch.library.custom_op("fasttrain::symmetric_log_sum_exp_backward", mutates_args=())
def _symmetric_backward(x_RD: Tensor, temperature: Tensor, own: bool, lse_R: Tensor, weight_R: Tensor) -> Tensor:
    """Σ_j (weight_i p_ij + weight_j p_ji) x_j: the gradient of x, where weight_i is lse_i's over τ."""
    return cpu.symmetric_backward(x_RD, temperature, own, lse_R, weight_R)


@_symmetric_backward.register_fake
def _(x_RD: Tensor, temperature: Tensor, own: bool, lse_R: Tensor, weight_R: Tensor) -> Tensor:
    return temperature.new_empty(x_RD.shape)


def _setup_symmetric(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x_RD, temperature, ctx.own = inputs
    ctx.save_for_backward(x_RD, temperature, output[0])


def _backward_symmetric(ctx: Context, grad_lse_R: Tensor, _maximum: Tensor) -> tuple[Tensor | None, ...]:
    x_RD, temperature, lse_R = ctx.saved_tensors
    grad_RD = _symmetric_backward(x_RD, temperature, ctx.own, lse_R, grad_lse_R / temperature)
    grad_temperature = None
    if ctx.needs_input_grad[1]:  # everything is a function of x xᵀ/τ, in which x stands twice
        grad_temperature = -(x_RD.to(grad_RD.dtype) * grad_RD).sum() / (2 * temperature)
    return grad_RD.to(x_RD.dtype), grad_temperature, None


_symmetric.register_autograd(_backward_symmetric, setup_context=_setup_symmetric)
