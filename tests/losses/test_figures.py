"""What contrasts tell of positives and negatives, against loops, and at no pass over the queue of its own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.kernels.similarity import cpu
from fasttrain.losses.figures import MARGIN, batch_figures, label_figures, queue_figures
from fasttrain.losses.queue import SCE, Decoupled, DecoupledWeighted, InfoNCE, QueueTerm, ReSSL, read_queue
from fasttrain.losses.regularisers import Regularisers, regularised

CONTRASTS = [InfoNCE(0.2), Decoupled(0.1), DecoupledWeighted(0.07), SCE(0.1, 0.05, 0.5), ReSSL(0.1, 0.04)]
SIZES = [(1, 2, 8), (6, 7, 16), (16, 257, 32)]  # N, K, D


def rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def inputs(n: int, k: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, of which some are nearer to their key than to all of a queue, and others not."""
    q = rows(n, d, 1)
    towards = torch.linspace(0, 2, n, dtype=torch.float64)[:, None]
    return q.requires_grad_(), F.normalize(towards * q.detach() + rows(n, d, 2), dim=1), rows(k, d, 3)


def slow(q: Tensor, keys: Tensor, negatives: list[list[Tensor]]) -> dict[str, float]:
    """One query at a time; negatives: those of each query."""
    nearer, positive, negative = 0.0, 0.0, 0.0
    for row, key, others in zip(q, keys, negatives, strict=True):
        similarities = [float(row @ other) for other in others]
        positive += float(row @ key) / len(q)
        negative += sum(similarities) / len(similarities) / len(q)
        nearer += (float(row @ key) > max(similarities)) / len(q)
    return {"contrastive_accuracy": nearer, "positive_similarity": positive, "negative_similarity": negative}


def of_queue(contrast: QueueTerm, q: Tensor, keys: Tensor, queue: Tensor) -> dict[str, Tensor]:
    return queue_figures(contrast, q, keys, read_queue([contrast], q, keys, queue))


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize(("n", "k", "d"), SIZES)
def test_figures_over_the_queue(contrast: QueueTerm, n: int, k: int, d: int) -> None:
    q, keys, queue = inputs(n, k, d)
    ours, expected = of_queue(contrast, q, keys, queue), slow(q.detach(), keys, [list(queue)] * n)
    assert {name: float(value) for name, value in ours.items()} == pytest.approx(expected, abs=1e-12)
    assert not any(value.requires_grad for value in ours.values())
    if n == 16:
        assert 0 < ours["contrastive_accuracy"] < 1


def test_figures_over_the_batch() -> None:
    q, keys, _ = inputs(9, 1, 16)
    a, b = rows(9, 16, 4), rows(9, 16, 5)
    others = [[x for j, x in enumerate(a) if j != i] for i in range(9)]
    both = [first + [x for j, x in enumerate(b) if j != i] for i, first in enumerate(others)]
    for given, expected in (((a,), others), ((a, b), both)):
        ours, slowly = batch_figures(q, keys, *given), slow(q.detach(), keys, expected)
        assert {name: float(x) for name, x in ours.items()} == pytest.approx(slowly, abs=1e-12)
        assert 0 < ours["contrastive_accuracy"] < 1


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0], [3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5]])
def test_figures_by_labels_are_means_over_the_rows_that_have_such_pairs(labels: list[int]) -> None:
    z = rows(6, 16, 1)
    expected = {}
    for name, same in (("positive_similarity", True), ("negative_similarity", False)):
        means = []
        for i in range(6):
            pairs = [float(z[i] @ z[j]) for j in range(6) if j != i and (labels[j] == labels[i]) == same]
            means += [sum(pairs) / len(pairs)] if pairs else []
        expected[name] = sum(means) / max(1, len(means))
    ours = label_figures(z, torch.tensor(labels))
    assert {name: float(value) for name, value in ours.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_once_all_rows_are_alike_no_positive_is_nearer(dtype: torch.dtype, seed: int) -> None:
    """In the queue's dtype a row's square need not be 1, and sums in another order differ by roundings."""
    one = rows(1, 128, seed).float()
    q, queue = one.repeat(16, 1), one.to(dtype).repeat(300, 1)
    for figures in (of_queue(InfoNCE(0.1), q, q, queue), batch_figures(q, q, q)):
        assert figures["contrastive_accuracy"] == 0
        assert float(figures["negative_similarity"]) == pytest.approx(float(figures["positive_similarity"]), abs=5e-3)


def test_a_positive_that_is_nearer_by_more_than_roundings_counts() -> None:
    q = torch.eye(2)[:1]
    for gap, nearer in ((2 * MARGIN, 1), (-2 * MARGIN, 0)):
        keys, queue = (torch.tensor([[math.cos(x), math.sin(x)]]) for x in (math.acos(0.5 + gap), math.acos(0.5)))
        assert of_queue(InfoNCE(0.2), q, keys, queue)["contrastive_accuracy"] == nearer


class MeansOver(TorchDispatchMode):
    """Counts the means over the rows of matrices of a shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.mean.dim and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("uniform", ["none", "queue"])
def test_figures_take_no_pass_over_the_queue_but_the_mean_that_uniformity_has(
    uniform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, whole = [], cpu.readout
    monkeypatch.setattr(cpu, "readout", lambda *a: passes.append(a) or whole(*a))
    q, keys, queue = inputs(6, 40, 16)
    with MeansOver((40, 16)) as means:
        loss, terms = regularised(InfoNCE(0.2), Regularisers(uniform=uniform), q, keys, None, queue)
    loss.backward()
    assert len(passes) == means.count == 1
    expected = slow(q.detach(), keys, [list(queue)] * 6)
    assert {name: float(terms[name]) for name in expected} == pytest.approx(expected, abs=1e-12)


def test_figures_of_a_symmetric_loss_are_means_over_its_directions() -> None:
    q, keys, queue = inputs(8, 40, 16)
    options = Regularisers()
    _, both = regularised(InfoNCE(0.2), options, q, keys, None, queue, directions=2)
    each = [regularised(InfoNCE(0.2), options, q[at], keys[at], None, queue)[1] for at in (slice(4), slice(4, 8))]
    assert all(torch.allclose(value, (each[0][name] + each[1][name]) / 2) for name, value in both.items())


def test_figures_compile_without_a_graph_break() -> None:
    q, keys, queue = (x.detach().float() for x in inputs(6, 40, 16))
    q.requires_grad_()
    options = Regularisers(uniform="queue")

    def terms(q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, values = regularised(InfoNCE(0.2), options, q, keys, None, queue)
        return loss, values | batch_figures(q, keys, keys)

    compiled = torch.compile(terms, fullgraph=True, backend="aot_eager")
    for name, value in terms(q)[1].items():
        assert torch.allclose(compiled(q)[1][name], value, atol=1e-6), name
