"""The look-up's versions against fp64, and what else its contract promises."""

import math

import pytest
import torch
from support.similarity import VERSIONS, Largest, device_of, rows

from fasttrain.kernels.similarity import cpu, nearest

ALL = [("reference", torch.float64), ("cpu", torch.float64), *VERSIONS]


@pytest.mark.parametrize(("impl", "dtype"), ALL)
@pytest.mark.parametrize(
    ("r", "k", "d"), [(0, 3, 8), (1, 1, 8), (17, 63, 100), (33, 257, 128), (cpu.ROWS + 1, 90, 16), (3, 2100, 256)]
)
def test_the_nearest_row_is_found(impl: str, dtype: torch.dtype, r: int, k: int, d: int) -> None:
    x, queue = rows(r, d, 1, dtype, device_of(impl)), rows(k, d, 2, dtype, device_of(impl))
    index = nearest(x, queue, impl=impl)
    s = x.double() @ queue.double().T
    assert index.dtype == torch.int64
    assert index.shape == (r,)
    # Where two are equally near but for roundings, either may be found.
    assert torch.allclose(s.gather(1, index[:, None])[:, 0], s.amax(1), atol=1e-6 * math.sqrt(d))


@pytest.mark.parametrize(("impl", "dtype"), ALL)
def test_of_equals_the_first_is_found(impl: str, dtype: torch.dtype) -> None:
    """Equal exactly: rows of ones and zeros. In one tile, in several, and beside rows that beat the first tile's."""
    queue = torch.zeros(2 * cpu.KEYS + 70, 16)
    queue[[5, 6, 40, 700, cpu.KEYS + 1], 0] = 1
    queue[[cpu.KEYS, cpu.KEYS + 65, 2 * cpu.KEYS + 3], 1] = 1
    queue[3, 1] = 0.5
    queue[[2 * cpu.KEYS + 1, 2 * cpu.KEYS + 69], 2] = -1
    queue = queue.to(device=device_of(impl), dtype=dtype)
    x = torch.eye(16, dtype=dtype, device=queue.device)[:4]
    assert nearest(x, queue, impl=impl).tolist() == [5, cpu.KEYS, 0, 0]
    assert nearest(-x, queue, impl=impl).tolist() == [0, 0, 2 * cpu.KEYS + 1, 0]


@pytest.mark.parametrize(("impl", "dtype"), ALL)
@pytest.mark.parametrize("place", [0, 77, 299])
def test_a_row_of_no_numbers_shows(impl: str, dtype: torch.dtype, place: int) -> None:
    x, queue = rows(3, 16, 1, dtype, device_of(impl)), rows(300, 16, 2, dtype, device_of(impl))
    queue[place, 2] = math.nan
    assert nearest(x, queue, impl=impl).tolist() == [place] * 3


@pytest.mark.parametrize(("impl", "dtype"), ALL)
def test_similarities_that_are_all_minus_infinity_give_a_row_of_the_queue(impl: str, dtype: torch.dtype) -> None:
    queue = torch.full((70, 16), -math.inf, dtype=dtype, device=device_of(impl))
    assert nearest(torch.ones_like(queue[:3]), queue, impl=impl).tolist() == [0] * 3


def test_the_cpu_version_holds_one_tile() -> None:
    x, queue = rows(600, 16, 1), rows(20000, 16, 2)
    with Largest() as largest:
        cpu.nearest(x, queue)
    assert largest.numbers <= max(cpu.ROWS * cpu.KEYS, queue.numel())


def test_it_compiles_and_is_registered_correctly() -> None:
    x, queue = rows(4, 16, 1).requires_grad_(), rows(9, 16, 2)
    torch.library.opcheck(torch.ops.fasttrain.nearest.default, (x, queue, "cpu"))
    compiled = torch.compile(lambda x, queue: queue[nearest(x, queue)], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, queue), queue[(x @ queue.T).argmax(1)])


def test_what_does_not_go_together_is_refused() -> None:
    x, queue = rows(2, 4, 1), rows(3, 4, 2)
    with pytest.raises(ValueError, match=r"'magic'; choose from"):
        nearest(x, queue, impl="magic")
    with pytest.raises(ValueError, match="must be"):
        nearest(x, queue[:, :3])
    with pytest.raises(ValueError, match="none to compare"):
        nearest(x, queue[:0])
