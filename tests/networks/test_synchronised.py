"""Batch norm over all ranks: compiled, and by the kernels of a GPU. Its values are held to plain batch norm's in
test_batch_norm.py."""

import copy
import pathlib
from collections.abc import Callable

import pytest
import torch
from support.forks import on_ranks, succeed
from torch import Tensor, nn

from fasttrain.engine.ranks import Ranks
from fasttrain.networks.batch_norm import convert_batch_norm
from fasttrain.networks.synchronised import NormaliseNatively, NormaliseTogether


def _compiled(folder: pathlib.Path, kind: str) -> None:
    ranks = Ranks("cpu")
    torch.manual_seed(0)
    head = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False)
    network = convert_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), *head), kind)
    x, found = torch.randn(4, 3, 2, 2) + ranks.rank, []
    for module in (network, copy.deepcopy(network)):
        if found:
            module.compile(backend="aot_eager", fullgraph=True)  # a break would raise
        out = module(x)
        (out * torch.arange(24).view(4, 6)).sum().backward()
        with torch.no_grad():
            again = module(x)
        found.append([out, again, *(p.grad for p in module.parameters()), *module.buffers()])
    torch.testing.assert_close(*found)
    (folder / f"{ranks.rank}").touch()
    ranks.close()


@pytest.mark.parametrize("kind", ["sync", "machine"])
def test_a_compiler_takes_synchronised_batch_norm_in_one_graph(kind: str, tmp_path: pathlib.Path) -> None:
    succeed(on_ranks(tmp_path, 2, _compiled, tmp_path, kind))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in "01") == ["0", "1"]


def _gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's kernels for a GPU compute, for want of one."""

    def shaped(value_C: Tensor, x: Tensor) -> Tensor:
        return value_C.view(1, -1, *[1] * (x.dim() - 2))

    def dims(x: Tensor) -> list[int]:
        return [0, *range(2, x.dim())]

    def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x, dims(x), correction=0)
        return mean, (var + eps).rsqrt()

    def gather(
        x: Tensor, mean_WC: Tensor, inverse_std_WC: Tensor, running_mean: Tensor, running_var: Tensor,
        momentum: float, eps: float, rows_W: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows, share = rows_W.sum(), (rows_W / rows_W.sum())[:, None]
        mean = (mean_WC * share).sum(0)
        var = ((inverse_std_WC.pow(-2) - eps + (mean_WC - mean).square()) * share).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * rows / (rows - 1), momentum)
        return mean, (var + eps).rsqrt()

    def elementwise(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_std: Tensor, eps: float
    ) -> Tensor:
        out = (x - shaped(mean, x)) * shaped(inverse_std, x)
        return out if weight is None or bias is None else out * shaped(weight, x) + shaped(bias, x)

    def reduce(
        grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor | None, *wanted: bool
    ) -> tuple[Tensor | None, ...]:
        total, along = grad.sum(dims(x)), (grad * (x - shaped(mean, x))).sum(dims(x))
        return total, along, along * inverse_std if wanted[1] else None, total if wanted[2] else None

    def backward(
        grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor | None, total: Tensor,
        along: Tensor, rows_W: Tensor,
    ) -> Tensor:  # fmt: skip
        assert rows_W.dtype == torch.int32
        along = shaped(along * inverse_std.square(), x) * (x - shaped(mean, x))
        scale = inverse_std if weight is None else inverse_std * weight
        return (grad - (shaped(total, x) + along) / rows_W.sum()) * shaped(scale, x)

    kernels: dict[str, Callable] = {
        "stats": stats, "gather_stats_with_counts": gather, "elemt": elementwise, "backward_reduce": reduce,
        "backward_elemt": backward,
    }  # fmt: skip
    for name, kernel in kernels.items():
        monkeypatch.setattr(torch, f"batch_norm_{name}", kernel)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3, 2)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_gpu_s_kernels_are_called_for_what_the_plain_form_computes(
    monkeypatch: pytest.MonkeyPatch, device: str, shape: tuple[int, ...], affine: bool
) -> None:
    if device == "cpu":
        _gpu_kernels(monkeypatch)
    torch.manual_seed(0)
    x, weights = torch.randn(2, *shape, dtype=torch.float64, device=device) * 2 + 1
    parameters = torch.rand(2, 5, dtype=torch.float64, device=device) + 0.5
    found = []
    for normalise in (NormaliseTogether, NormaliseNatively):
        inputs = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in parameters)]
        running = torch.zeros_like(parameters[0]), torch.ones_like(parameters[0])
        out = normalise.apply(*(inputs if affine else [inputs[0], None, None]), *running, 0.1, 1e-5)
        (out * weights).sum().backward()
        found.append([out, *running, *(tensor.grad for tensor in inputs[: 3 if affine else 1])])
    torch.testing.assert_close(*found)
