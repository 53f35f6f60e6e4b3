"""The readout's versions against fp64, forward and every gradient, and what else its contract promises."""

import contextlib
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.commands import ROOT
from support.hopper import compiled_for_hopper
from support.similarity import SLACK, VERSIONS, Largest, assert_maximum, device_of, plain, rows

from fasttrain.kernels.similarity import cpu, log_sum_exp, nearest, readout, readout_with_maximum

SIZES = [(1, 1, 8), (3, 7, 16), (17, 63, 100), (33, 257, 128), (20, 1023, 64), (5, 130, 256)]  # R, K, D
# All of them where tiles are full and cut; one each elsewhere.
TEMPERATURES = {size: (t,) for size, t in zip(SIZES, (0.2, 10.0, 0.01, 0.2, 0.01, 10.0), strict=True)}
TEMPERATURES[33, 257, 128] = (0.01, 0.2, 10.0)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def everything(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    x: torch.Tensor,
    queue: torch.Tensor,
    temperature: torch.Tensor,
    own: int | None,
) -> dict[str, torch.Tensor]:
    """By name: lse, O, and the gradients of x and of the temperatures that the lse, the O and both give."""
    gradients = {}
    for of, use_lse, use_out in (("lse", True, False), ("out", False, True), ("both", True, True)):
        x, temperature = x.detach().requires_grad_(), temperature.detach().requires_grad_()
        lse, out = function(x, queue, temperature, own)
        weights = [torch.linspace(-1, 2, value.numel(), device=x.device).view(value.shape) for value in (lse, out)]
        total = 0
        if use_lse:
            total = total + (lse * weights[0].to(lse.dtype)).sum()
        if use_out:
            total = total + (out * weights[1].to(out.dtype)).sum()
        gradients[f"{of} by x"], gradients[f"{of} by τ"] = torch.autograd.grad(total, (x, temperature))
    return {name: value.detach().double().cpu() for name, value in {"lse": lse, "out": out, **gradients}.items()}


@pytest.mark.parametrize(("impl", "dtype"), VERSIONS)
@pytest.mark.parametrize(("r", "k", "d", "temperature"), [(*size, t) for size in SIZES for t in TEMPERATURES[size]])
@pytest.mark.parametrize("own", [None, 0])
def test_values_and_gradients_against_fp64(
    impl: str, dtype: torch.dtype, r: int, k: int, d: int, own: int | None, temperature: float
) -> None:
    if own is not None and k < max(r, 2):
        pytest.skip("needs a key of its own for every row, and one more")
    device = device_of(impl)
    x, queue = rows(r, d, 1, dtype, device), rows(k, d, 2, dtype, device)
    t = torch.linspace(temperature, 1.5 * temperature, r, dtype=torch.float32, device=device)
    truth = everything(plain, x.double(), queue.double(), t.double(), own)
    eager = everything(plain, x, queue, t, own)
    ours = everything(lambda *a: readout(*a[:3], own=a[3], impl=impl), x, queue, t, own)
    # Where plain torch happens to be exact, roundings of the largest number are still allowed; in fp32 also those of an
    # exponent, which is as large as 1/τ.
    floor = torch.finfo(dtype).eps * (max(8, 2 / temperature) if dtype == torch.float32 else 2)
    # A gradient through O rests on differences g·Q_j − g·O, divided by τ for x and by τ² for a temperature. Where they
    # should be 0, as for a single key, plain torch has exactly that; of sums in another order roundings of fp32 remain.
    divided = {"out by x": 1, "both by x": 1, "out by τ": 2, "both by τ": 2}
    for name, true in truth.items():
        error, eagers = ((values[name] - true).abs().max() for values in (ours, eager))
        allowed = SLACK * eagers + floor * max(1.0, float(true.abs().max()))
        if name in divided:
            allowed += 8 * torch.finfo(torch.float32).eps / temperature ** divided[name]
        assert error <= allowed, name


@pytest.mark.parametrize(("impl", "dtype"), [("reference", torch.float32), ("reference", torch.float64), *VERSIONS])
@pytest.mark.parametrize(("r", "k", "d"), [*SIZES, (2, 2 * cpu.KEYS + 1, 16), (cpu.ROWS + 1, 600, 16)])
@pytest.mark.parametrize("own", [None, 0])
def test_the_maximum_is_the_nearest_key_of_those_that_are_read(
    impl: str, dtype: torch.dtype, r: int, k: int, d: int, own: int | None
) -> None:
    if own is not None and k < max(r, 2):
        pytest.skip("needs a key of its own for every row, and one more")
    x, queue = rows(r, d, 1, dtype, device_of(impl)), rows(k, d, 2, dtype, device_of(impl))
    queue[: min(r, k)] = x[:k]  # own keys are the nearest
    t = torch.linspace(0.1, 0.2, r, dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    lse, out, maximum = readout_with_maximum(x.requires_grad_(), queue, t.requires_grad_(), own=own, impl=impl)
    assert_maximum(maximum, x.detach(), queue, t.detach(), own)
    assert lse.requires_grad
    for ours, without in zip((lse, out), readout(x, queue, t, own=own, impl=impl), strict=True):
        assert torch.equal(ours, without)


@pytest.mark.parametrize(("impl", "dtype"), VERSIONS)
def test_rows_that_fill_no_tile_and_more_than_one(impl: str, dtype: torch.dtype) -> None:
    device = device_of(impl)
    for r, k in ((0, 5), (1, 3), (cpu.ROWS + 1, 5), (2, 2 * cpu.KEYS + 1)):
        x, queue = rows(r, 16, 1, dtype, device), rows(k, 16, 2, dtype, device)
        lse, out = readout(x, queue, 0.5, impl=impl)
        true_lse, true_out = plain(x.double(), queue.double(), torch.full((r,), 0.5, device=device).double(), None)
        assert torch.allclose(lse.double(), true_lse, atol=2e-3)
        assert torch.allclose(out.double(), true_out, atol=2e-3)
        assert lse.dtype == out.dtype == torch.float32


@pytest.mark.parametrize("own", [0, 3, cpu.KEYS - 1, cpu.KEYS + 5])
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_own_keys_are_left_out_wherever_they_lie(impl: str, own: int) -> None:
    device = device_of(impl)
    queue = rows(cpu.KEYS + 30, 16, 2, torch.float32, device)
    x = queue[own : own + 20].clone()  # its own key is by far the closest
    lse, out = readout(x, queue, 0.05, own=own, impl=impl)
    true_lse, true_out = plain(x.double(), queue.double(), torch.full((20,), 0.05, device=device).double(), own)
    assert torch.allclose(lse.double(), true_lse, atol=1e-5)
    assert torch.allclose(out.double(), true_out, atol=1e-5)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("temperature", [0.01, 10.0])
def test_identical_rows(impl: str, temperature: float) -> None:
    device = device_of(impl)
    row = rows(1, 32, 1, torch.float32, device)
    lse, out = readout(row.repeat(5, 1), row.repeat(70, 1), temperature, impl=impl)
    assert torch.allclose(lse, torch.full_like(lse, 1 / temperature + math.log(70)), rtol=1e-6)
    assert torch.allclose(out, row.expand_as(out), atol=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["row", "queue"])
def test_bad_numbers_do_not_come_out_plausible(impl: str, bad: float, where: str) -> None:
    device = device_of(impl)
    x, queue = rows(3, 16, 1, torch.float32, device), rows(300, 16, 2, torch.float32, device)
    (x if where == "row" else queue)[1, 2] = bad
    x.requires_grad_()
    lse, out, maximum = readout_with_maximum(x, queue, 0.1, impl=impl)
    gradient = torch.autograd.grad(lse.sum(), x)[0]
    if where == "row":
        assert not lse[1].isfinite()
        assert not maximum[1].isfinite()
        assert not out[1].isfinite().any()
        assert not gradient[1].isfinite().any()
        assert lse[[0, 2]].isfinite().all()
    elif math.isnan(bad):
        assert not lse.isfinite().any()
        assert not maximum.isfinite().any()
        assert not out.isfinite().any()
    else:  # a similarity of minus infinity takes no part in the sum, but its 0 · inf shows in the average
        assert not out.isfinite().all(1).any()


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_the_same_from_run_to_run(impl: str) -> None:
    x, queue = rows(40, 64, 1, torch.float32, device_of(impl)), rows(700, 64, 2, torch.float32, device_of(impl))
    first, second = (readout(x, queue, 0.07, impl=impl) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_gradient_of_lse_alone_reads_the_queue_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("second pass")

    monkeypatch.setattr(cpu, "readout_backward", refuse)
    x = rows(4, 16, 1).requires_grad_()
    lse, _ = readout(x, rows(9, 16, 2), 0.1)
    lse.sum().backward()
    assert x.grad is not None
    with pytest.raises(AssertionError, match="second pass"):
        readout(x, rows(9, 16, 2), 0.1)[1].sum().backward()


def test_the_cpu_version_holds_one_tile() -> None:
    x, queue, t = rows(600, 16, 1), rows(20000, 16, 2), torch.full((600,), 0.1, dtype=torch.float64)
    with Largest() as largest:
        lse, out, _ = cpu.readout(x, queue, t, -1)
        cpu.readout_backward(x, queue, t, -1, lse, out, torch.ones_like(out))
    assert largest.numbers <= max(cpu.ROWS * cpu.KEYS, x.numel(), queue.numel())
    assert largest.numbers < len(x) * len(queue) / 10


def test_operators_are_registered_correctly() -> None:
    x, queue = rows(4, 16, 1).requires_grad_(), rows(9, 16, 2)
    t = torch.full((4,), 0.2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.fasttrain.readout.default, (x, queue, t, -1, True, "cpu"))


def test_unavailable_versions_and_wrong_shapes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttrain.kernels.similarity import gpu

    x, queue = rows(2, 4, 1, torch.float32), rows(3, 4, 2, torch.float32)
    with pytest.raises(ValueError, match=r"'magic'; choose from: auto, reference, cpu, triton"):
        readout(x, queue, 0.1, impl="magic")
    with pytest.raises(ValueError, match=r"unavailable for torch.float64.*choose from"):
        readout(x.double(), queue.double(), 0.1, impl="triton")
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"'triton' is unavailable .* on cpu"):
        readout(x, queue, 0.1, impl="triton")
    for bad in (queue[:, :3], queue.double(), queue[0]):
        with pytest.raises(ValueError, match="must be"):
            readout(x, bad, 0.1)
    with pytest.raises(ValueError, match="none to compare"):
        readout(x, queue[:0], 0.1)
    with pytest.raises(ValueError, match="own 2"):
        readout(x, queue, 0.1, own=2)
    with pytest.raises(ValueError, match="temperature has shape"):
        readout(x, queue, torch.ones(3))


@pytest.mark.gpu
def test_memory_stays_proportional_to_the_rows() -> None:
    x, queue = rows(4096, 128, 1, torch.bfloat16, "cuda").requires_grad_(), rows(65536, 128, 2, torch.bfloat16, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    readout(x, queue, 0.2)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * x.numel() * 4


@pytest.mark.gpu
def test_runs_inside_a_cuda_graph() -> None:
    x, queue = rows(64, 128, 1, torch.bfloat16, "cuda"), rows(5000, 128, 2, torch.bfloat16, "cuda")
    expected = readout(x, queue, 0.2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = readout(x, queue, 0.2)
    graph.replay()
    assert torch.equal(captured[0], expected[0])
    assert torch.equal(captured[1], expected[1])


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be the tensors'."""
    from fasttrain.kernels.similarity import gpu

    within, launched = [], []

    @contextlib.contextmanager
    def on_device_of(tensor: torch.Tensor) -> Iterator[None]:
        within.append(tensor.device)
        yield
        within.pop()

    class Launched:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(list(within))
            return self.kernel[grid]

    monkeypatch.setattr(torch.cuda, "device_of", on_device_of)
    for name in ("part_kernel", "combine_kernel", "backward_kernel", "keys_backward_kernel", "nearest_kernel"):
        monkeypatch.setattr(gpu, name, Launched(getattr(gpu, name)))
    x, queue = (rows(count, 16, count, torch.float32, device_of("triton")) for count in (3, 9))
    x.requires_grad_()
    readout(x, queue, 0.2, impl="triton")[1].sum().backward()
    log_sum_exp(x.detach(), queue.requires_grad_(), 0.2, impl="triton").sum().backward()
    nearest(x, queue, impl="triton")
    assert launched == [[x.device]] * 7


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path: pathlib.Path) -> None:
    """What tiles_for promises; in fp32, masks may spill a little."""
    kernels = compiled_for_hopper("similarity", tmp_path)
    large = {
        "part_kernel",
        "keys_backward_kernel",
        "nearest_kernel",
    }  # that have large blocks where there are many rows
    assert {name for name, _ in kernels} == large | {"combine_kernel", "backward_kernel"}
    assert len(kernels) == 147
    for (name, label), (registers, stack, shared) in kernels.items():
        masked_fp32 = "float32" in label and label.endswith("keys 65535")
        assert stack <= (256 if masked_fp32 else 0), (name, label)
        if "bfloat16" in label and "dim 256" not in label:
            many = any(f"rows {rows} " in label for rows in (4096, 8191, 8192))
            threads = 256 if name in large and many else 128
            assert 2 * threads * registers <= 65536, (name, label)
            assert 2 * shared <= 227 * 1024, (name, label)


def test_serialised_products_are_reported(tmp_path: pathlib.Path) -> None:
    """128 × 256 sums in fp32 are more than the registers of 128 threads."""
    script = """
import torch
from benchmarks import compile_hopper
from fasttrain.kernels.similarity import gpu, readout

def starved():
    gpu.tiles_for = lambda *_: gpu.Tiles(128, 64, 4, 2)
    gpu._multiprocessors = lambda _device: 132
    compile_hopper._stand_in(gpu)
    x_RD = torch.zeros(4096, 256, dtype=torch.bfloat16)
    readout(x_RD, torch.zeros(65536, 256, dtype=torch.bfloat16), 0.2, impl="triton")

compile_hopper.KERNELS = {"starved": starved}
raise SystemExit(compile_hopper.main([]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    assert "serialized due to insufficient register resources" in done.stderr
    assert "part_kernel" in done.stderr
