"""The losses of Barlow Twins and VICReg against slow loops, closed forms and published implementations."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.forks import on_ranks, succeed
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.engine.ranks import Ranks
from fasttrain.losses import reference
from fasttrain.losses.redundancy import _halves_by_columns, _halves_by_rows, barlow, off_diagonal, vicreg

SIZES = [(2, 3), (5, 4), (6, 8), (4, 16), (24, 16)]  # rows and columns: either form, for one matrix and for two
Tensors = tuple[torch.Tensor, ...]
Loss = Callable[[torch.Tensor, torch.Tensor], Tensors]


def views(rows: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of two views that are much alike, with columns of unequal means and widths."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64)
    wide = torch.rand(dim, generator=generator, dtype=torch.float64) + 0.2
    return (x * wide + 0.3).requires_grad_(), (x * wide + 0.3 * noise - 0.1).requires_grad_()


def correlations(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    """Both sums of Barlow Twins, one pair of columns at a time."""

    def standard(column: torch.Tensor) -> torch.Tensor:
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        return (column - mean) / torch.sqrt(variance + 1e-5)

    on = off = x.new_zeros(())
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            c = (standard(x[:, i]) * standard(y[:, j])).sum() / len(x)
            on, off = (on + (c - 1) ** 2, off) if i == j else (on, off + c**2)
    return on, off


def spreads(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    """The three terms of VICReg, one pair of columns at a time."""
    variance = covariance = x.new_zeros(())
    rows, dim = x.shape
    for z in (x, y):
        centred = [column - sum(column) / rows for column in z.T]
        for i in range(dim):
            std = torch.sqrt((centred[i] ** 2).sum() / (rows - 1) + 1e-4)
            variance = variance + torch.relu(1 - std) / dim / 2
            for j in range(dim):
                if i != j:
                    covariance = covariance + ((centred[i] * centred[j]).sum() / (rows - 1)) ** 2 / dim
    return ((x - y) ** 2).sum() / (rows * dim), variance, covariance


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> Tensors:
    """Of each input, 0 where it has no part in the loss."""
    return torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)


@pytest.mark.parametrize(("rows", "dim"), SIZES)
@pytest.mark.parametrize(
    ("fast", "plain", "slow"), [(barlow, reference.barlow, correlations), (vicreg, reference.vicreg, spreads)]
)
def test_every_term_and_gradient_is_that_of_a_slow_loop(
    fast: Loss, plain: Loss, slow: Loss, rows: int, dim: int
) -> None:
    x, y = views(rows, dim)
    for expected, *ours in zip(slow(x, y), fast(x, y), plain(x, y), strict=True):
        for value in ours:
            assert torch.allclose(value, expected, rtol=1e-10, atol=1e-12)
            for one, other in zip(gradients(value, x, y), gradients(expected, x, y), strict=True):
                assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("halves", [_halves_by_columns, _halves_by_rows])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_both_forms_give_half_of_each_gradient_whatever_the_shape(
    halves: Callable[[torch.Tensor, torch.Tensor], Tensors], same: bool, rows: int, dim: int
) -> None:
    a, b = views(rows, dim)
    with torch.no_grad():
        found = halves(a, a if same else b)
    b = a.detach().clone().requires_grad_() if same else b
    slow = sum((a[:, i] @ b[:, j]) ** 2 for i in range(dim) for j in range(dim) if i != j)
    for half, expected in zip(found, gradients(torch.as_tensor(slow), a, b), strict=True):
        assert torch.allclose(2 * half, expected)


@pytest.mark.parametrize("name", ["independent", "alike", "spread evenly"])
@pytest.mark.parametrize("rows", [64, 96, 127])
def test_taking_the_diagonal_off_afterwards_costs_at_most_a_bit_or_two(rows: int, name: str) -> None:
    """In fp32, against fp64, the form by rows is about as far off as the other one, which leaves the diagonal out."""
    dim = 128
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64)
    if name == "alike":
        b = a + 0.3 * b
    if name == "spread evenly":  # as little off the diagonal as so many rows allow
        a = b = torch.linalg.qr(a - a.mean(0))[0] @ torch.linalg.qr(b[: min(rows, dim)].T)[0].T * math.sqrt(rows)
    exact = _halves_by_columns(a, b)[0]
    errors = [float((form(a.float(), b.float())[0] - exact).norm()) for form in (_halves_by_rows, _halves_by_columns)]
    assert errors[0] <= 3 * errors[1]
    value = (a * exact).sum()
    total = value + (a * b).sum(0).square().sum()
    assert abs(off_diagonal(a.float(), b.float()) - value) < 1e-6 * total


class Matrices(TorchDispatchMode):
    """Counts products, the D×D matrices that exist at once, and the numbers of the largest tensor."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.products = self.most = self.largest = 0
        self._shape = (dim, dim)
        self._living: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func is torch.ops.aten.mm.default
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
            if out.shape == self._shape:
                storage = StorageWeakRef(out.untyped_storage())
                self._living[storage.cdata] = storage
        self._living = {key: one for key, one in self._living.items() if not one.expired()}
        self.most = max(self.most, len(self._living))
        return out


@pytest.mark.parametrize(
    ("loss", "rows", "products", "matrices"),
    [(barlow, 40, 4, 0), (barlow, 60, 3, 1), (vicreg, 60, 4, 0), (vicreg, 70, 4, 1)],
)
def test_products_and_memory_are_those_of_the_smaller_form(loss: Loss, rows: int, products: int, matrices: int) -> None:
    x, y = views(rows, 64)
    with Matrices(64) as found:
        sum(loss(x, y)).backward()
    assert (found.products, found.most) == (products, matrices)
    assert found.largest <= max(rows, 64 * matrices) * 64


def test_barlow_is_zero_for_equal_views_whose_columns_are_orthogonal() -> None:
    hadamard = torch.tensor([[1.0]], dtype=torch.float64)
    for _ in range(3):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    columns = 100 * hadamard[:, 1:]  # the first is constant
    on, off = barlow(columns, columns)
    assert on < 1e-16
    assert off.abs() < 1e-20


def test_barlow_of_equal_columns_is_the_number_of_pairs() -> None:
    column = torch.randn(16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1000
    on, off = barlow(column.expand(-1, 3), column.expand(-1, 3))
    assert float(on + 0.0051 * off) == pytest.approx(0.0306, abs=1e-8)


def test_barlow_of_independent_columns_is_about_their_number() -> None:
    x, y = torch.randn(2, 4096, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    on, off = barlow(x, y)
    assert float(on + 0.0051 * off) == pytest.approx(32, rel=0.05)


def test_barlow_sees_neither_scale_and_shift_of_columns_nor_the_order_of_rows() -> None:
    x, y = (1000 * view.detach() for view in views(12, 6))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(0.5, 3, 6, dtype=torch.float64)
    for other in (barlow(x * scale + 7, y / scale - scale), barlow(x[order], y[order])):
        for one, two in zip(barlow(x, y), other, strict=True):
            assert torch.allclose(one, two, rtol=1e-7)


def test_vicreg_of_constant_embeddings_is_its_variance_term() -> None:
    x = torch.full((8, 5), 3.0, dtype=torch.float64)
    invariance, variance, covariance = vicreg(x, x)
    assert float(25 * invariance + 25 * variance + covariance) == pytest.approx(24.75)


def test_vicreg_is_zero_for_equal_views_that_are_white_and_wide_enough() -> None:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    white = torch.linalg.qr(x - x.mean(0))[0] * math.sqrt(31)
    assert all(term.abs() < 1e-12 for term in vicreg(1.5 * white, 1.5 * white))


def test_vicreg_does_not_see_a_translation_of_both_views() -> None:
    x, y = views(9, 7)
    shift = torch.linspace(-50, 50, 7, dtype=torch.float64)
    for one, two in zip(vicreg(x, y), vicreg(x + shift, y + shift), strict=True):
        assert torch.allclose(one, two)


@pytest.mark.parametrize(("rows", "dim"), [(12, 48), (48, 12)])
def test_losses_are_those_of_lightly(rows: int, dim: int) -> None:
    lightly = pytest.importorskip("lightly.loss")
    x, y = views(rows, dim)
    on, off = barlow(x, y)
    invariance, variance, covariance = vicreg(x, y)
    ours = on + 0.005 * off, 25 * invariance + 25 * variance + covariance
    theirs = lightly.BarlowTwinsLoss(lambda_param=0.005)(x, y), lightly.VICRegLoss()(x, y)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
        for pair in zip(gradients(one, x, y), gradients(other, x, y), strict=True):
            assert torch.allclose(*pair, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [barlow, vicreg])
@pytest.mark.parametrize("rows", [8, 40])
def test_narrow_embeddings_are_widened_first(loss: Loss, rows: int) -> None:
    x, y = (view.detach().bfloat16().requires_grad_() for view in views(rows, 16))
    for value, expected in zip(loss(x, y), loss(x.double(), y.double()), strict=True):
        assert value.dtype == torch.float32
        assert torch.allclose(value, expected.float(), rtol=1e-5)


@pytest.mark.parametrize("loss", [barlow, vicreg])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [8, 40])
def test_bad_numbers_do_not_come_out_plausible(loss: Loss, bad: float, rows: int) -> None:
    x, y = (view.detach() for view in views(rows, 16))
    x[1, 2] = bad
    assert not sum(loss(x, y)).isfinite()


def _share(folder: pathlib.Path, name: str) -> None:
    """One rank's rows of a loss, and their gradient, averaged over the ranks as DDP does."""
    ranks = Ranks("cpu")
    rows = torch.load(folder / "inputs.pt").chunk(ranks.world_size, dim=1)[ranks.rank].clone().requires_grad_()
    loss = _sum(name, *rows)
    loss.backward()
    torch.save((loss.detach(), rows.grad / ranks.world_size), folder / f"rank{ranks.rank}.pt")
    ranks.close()


def _sum(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    terms = {"barlow": barlow, "vicreg": vicreg}[name](x, y)
    return sum(((number + 1) * term for number, term in enumerate(terms)), x.new_zeros(()))


@pytest.mark.parametrize("name", ["barlow", "vicreg"])
@pytest.mark.parametrize("dim", [6, 40])  # by columns, by rows
@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_gradient_over_ranks_equal_one_process(
    tmp_path: pathlib.Path, name: str, dim: int, world_size: int
) -> None:
    inputs = torch.stack(views(12, dim)).detach()
    torch.save(inputs, tmp_path / "inputs.pt")
    succeed(on_ranks(tmp_path, world_size, _share, tmp_path, name))
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    whole = inputs.clone().requires_grad_()
    loss = _sum(name, *whole)
    loss.backward()
    assert torch.allclose(torch.stack([part[0] for part in parts]).mean(), loss)
    assert torch.allclose(torch.cat([part[1] for part in parts], dim=1), whole.grad)
