"""Softmax regression: the optimum, which others find too, however it is reached."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttrain.evaluation.softmax_regression import SoftmaxRegression


def problem(count: int = 300, width: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs of very different scales, with a 1 at the end, and classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    target_N = torch.randint(0, classes, (count,), generator=generator)
    x_NF = torch.randn(count, width, generator=generator, dtype=torch.float64) + torch.eye(classes, width)[target_N]
    scaled_NF = x_NF * torch.logspace(-2, 1, width, dtype=torch.float64) + 3
    return torch.cat([scaled_NF, torch.ones(count, 1)], 1).double(), target_N


def penalised(width: int) -> Tensor:
    return torch.tensor([1.0] * width + [0.0], dtype=torch.float64)


def objective(x_ND: Tensor, target_N: Tensor, weight_DC: Tensor, C: float) -> Tensor:
    loss = torch.nn.functional.cross_entropy(x_ND @ weight_DC, target_N, reduction="sum")
    return loss + weight_DC[:-1].square().sum() / (2 * C)


@pytest.mark.parametrize("C", [1e-6, 1e-2, 1.0, 1e4])
def test_the_gradient_vanishes_where_it_ends(C: float) -> None:
    x_ND, target_N = problem()
    regression = SoftmaxRegression(
        [(x_ND[:100], target_N[:100]), (x_ND[100:], target_N[100:])], torch.zeros(4), penalised(6)
    )
    weight_DC, converged = regression.fit(C, 1e-8)
    at = weight_DC.clone().requires_grad_()
    objective(x_ND, target_N, at, C).backward()
    zero = torch.zeros_like(weight_DC, requires_grad=True)
    objective(x_ND, target_N, zero, C).backward()
    assert converged
    assert at.grad is not None
    assert zero.grad is not None
    assert at.grad.norm() <= 1.01e-8 * zero.grad.norm()


@pytest.mark.parametrize("C", [1e-3, 0.3, 100.0])
def test_weights_are_those_of_scikit_learn(C: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x_ND, target_N = problem()
    weight_DC, _ = SoftmaxRegression([(x_ND, target_N)], torch.zeros(4), penalised(6)).fit(C, 1e-9)
    other = linear_model.LogisticRegression(C=C, tol=1e-12, max_iter=100_000, solver="newton-cg")
    other.fit(x_ND[:, :-1].numpy(), target_N.numpy())
    theirs_DC = np.concatenate([other.coef_.T, other.intercept_[None]])
    np.testing.assert_allclose(weight_DC, theirs_DC, rtol=1e-4, atol=1e-5)


def test_a_start_nearby_changes_the_way_and_not_the_end() -> None:
    x_ND, target_N = problem()
    regression = SoftmaxRegression([(x_ND, target_N)], torch.zeros(4), penalised(6))
    near_DC, _ = regression.fit(0.1, 1e-4)
    torch.testing.assert_close(
        regression.fit(1.0, 1e-9, near_DC)[0], regression.fit(1.0, 1e-9)[0], rtol=1e-5, atol=1e-6
    )


def test_a_class_that_no_row_has_keeps_weights_of_zero_and_changes_no_others() -> None:
    x_ND, target_N = problem()
    plain_DC, _ = SoftmaxRegression([(x_ND, target_N)], torch.zeros(4), penalised(6)).fit(1.0, 1e-9)
    offset_C = torch.tensor([0, 0, -float("inf"), 0, 0])
    shifted_N = target_N + (target_N >= 2)
    weight_DC, converged = SoftmaxRegression([(x_ND, shifted_N)], offset_C, penalised(6)).fit(1.0, 1e-9)
    assert converged
    assert not weight_DC[:, 2].any()
    torch.testing.assert_close(weight_DC[:, [0, 1, 3, 4]], plain_DC, rtol=1e-5, atol=1e-6)


def test_what_is_separable_ends_at_the_penaltys_optimum() -> None:
    x_ND = torch.tensor([[-1.0, 1], [1, 1]], dtype=torch.float64)
    regression = SoftmaxRegression([(x_ND, torch.tensor([0, 1]))], torch.zeros(2), penalised(1))
    weight_DC, converged = regression.fit(1e5, 1e-9)
    assert converged
    a = float(weight_DC[0, 1])
    assert 4 / (1 + np.exp(2 * a)) == pytest.approx(2 * a / 1e5, rel=1e-3)  # where 2·softplus(−2a) + a²/C is least


@pytest.mark.parametrize("target", [(0, 1, 0, 1), (0, 0, 0, 0), (0, 0, 0, 1)])
def test_inputs_that_are_all_the_same_end_at_once_and_without_nan(target: tuple[int, ...]) -> None:
    seen = []

    def counted(part: Tensor) -> Tensor:
        seen.append(part)
        return part

    x_ND = torch.cat([torch.full((4, 3), 1e-17), torch.ones(4, 1)], 1).double()
    regression = SoftmaxRegression([(x_ND, torch.tensor(target))], torch.zeros(2), penalised(3), counted)
    weight_DC, converged = regression.fit(1e5, 1e-6)
    assert converged
    assert weight_DC.isfinite().all()
    assert len(seen) < 40
