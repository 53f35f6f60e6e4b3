#!/usr/bin/env python3
"""InfoNCE with both terms over the queue, forward and backward: ours beside what PyTorch offers for it.

    python benchmarks/similarity.py

Correctness comes first: no figure is printed for a side whose loss or gradient is wrong. Then every round runs every
side once, on inputs that rotate through more memory than a cache holds; medians over the rounds count. The floor is
what the products and one read of the queue take at the speeds measured in the same run. On a GPU in bf16, times by CUDA
events; on a CPU in fp32 and smaller, by the clock. Prints a table, appends a line to
benchmarks/results/similarity.jsonl; the last line of the output is JSON.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script from a bare checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import record
from fasttrain.cli import finish, parse
from kernels import similarity

TAU = 0.2  # of all three terms, as in the presets
DIM = 128
MEMORY_ROWS = 4096  # at which memory is compared, with a queue of 65,536
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]  # q, k, queue
Run = Callable[[int], None]  # takes the number of the call


@dataclass(frozen=True)
class Options:
    """Time the losses over the queue beside eager PyTorch, torch.compile and its attention kernels."""

    rounds: int = 7
    """Rounds; each runs every side once. Medians over them count."""
    seconds: float = 0.2
    """Time that one side takes in one round, about."""


def ours(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    terms = similarity.queue_terms(q, k, queue, TAU, consistency_temperature=TAU, uniformity_temperature=TAU)
    assert terms.consistency is not None
    assert terms.uniformity is not None
    return terms.contrast + terms.consistency + terms.uniformity


def eager(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """One matrix of similarities a side, shared by the terms, in the queue's dtype: the best that plain torch does."""
    q, k = q.to(queue.dtype), k.to(queue.dtype)
    s_NK, t_NK = (q @ queue.T / TAU).float(), (k @ queue.T / TAU).float()
    positive_N = (q.float() * k.float()).sum(1) / TAU
    lse_N = s_NK.logsumexp(1)
    contrast_N = torch.logaddexp(positive_N, lse_N) - positive_N
    target_NK = t_NK.log_softmax(1)
    consistency_N = (target_NK.exp() * (target_NK - s_NK)).sum(1) + lse_N
    return (contrast_N + consistency_N + lse_N - s_NK.mean(1)).mean() - math.log(len(queue))


class _FromReadout(torch.autograd.Function):
    """The three terms from (lse, O), with their closed-form gradient: what an attention kernel needs beside it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, q: Tensor, k: Tensor, queue: Tensor, lse: Tensor, out: Tensor
    ) -> Tensor:
        n = len(q)
        lse_q, lse_k, out_q, out_k = lse[:n], lse[n:], out[:n].float(), out[n:].float()
        mean = queue.mean(0, dtype=torch.float32)
        positive = (q * k).sum(1) / TAU
        p = torch.sigmoid(positive - lse_q)[:, None]
        contrast = -F.logsigmoid(positive - lse_q)
        consistency = ((k - q) * out_k).sum(1) / TAU - lse_k + lse_q
        uniformity = lse_q - q @ mean / TAU - math.log(len(queue))
        ctx.save_for_backward(((p - 1) * k + (1 - p) * out_q + out_q - out_k + out_q - mean) / (TAU * n))
        return (contrast + consistency + uniformity).mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override] # noqa: ANN001
        return ctx.saved_tensors[0] * grad, None, None, None, None


def attention(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """The readout by PyTorch's flash attention, keys and values being the queue."""
    x = torch.cat([q, k]).detach().to(queue.dtype)[None, None]
    keys = queue[None, None]
    if queue.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(x, keys, keys, scale=1 / TAU)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, keys, keys, scale=1 / TAU)
    return _FromReadout.apply(q, k, queue, lse[0, 0], out[0, 0])


def make_flex() -> Loss:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        x = torch.cat([q, k]).detach().to(queue.dtype)[None, None]
        keys = queue[None, None]
        out, lse = compiled(x, keys, keys, scale=1 / TAU, return_lse=True)  # type: ignore[arg-type]
        return _FromReadout.apply(q, k, queue, lse[0, 0].float(), out[0, 0])

    return flex


def make_sides(on_gpu: bool) -> dict[str, Loss]:
    sides: dict[str, Loss] = {
        "ours": ours,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        "attention": attention,
    }
    if on_gpu:  # on a CPU it has no gradient-free entry that returns the log-sum-exp
        sides["flex"] = make_flex()
    return sides


def make_inputs(n: int, keys: int, device: str, dtype: torch.dtype) -> list[Inputs]:
    """Sets of q, k (fp32) and queue whose queues together exceed a cache of 100 MB."""
    count = max(2, -(-100_000_000 // (keys * DIM * dtype.itemsize)))
    generator = torch.Generator(device).manual_seed(0)

    def rows(count: int) -> Tensor:
        return F.normalize(torch.randn(count, DIM, device=device, generator=generator), dim=1)

    return [(rows(n).requires_grad_(), rows(n), rows(keys).to(dtype)) for _ in range(count)]


def check(sides: dict[str, Loss], q: Tensor, k: Tensor, queue: Tensor) -> dict[str, Loss]:
    """The sides whose loss and gradient are right for the first 64 rows, in fp64; the others are named."""
    q, k = (x[:64].detach() for x in (q, k))
    exact, exact_gradient = loss_and_gradient(eager, q.to(queue.dtype).double(), k.to(queue.dtype), queue.double())
    right = {}
    for name, side in sides.items():
        try:
            loss, gradient = loss_and_gradient(side, q, k, queue)
        except Exception as error:  # a rival that this version of torch or this device does not offer
            print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        off = float((gradient - exact_gradient).abs().max() / exact_gradient.abs().max())
        if abs(loss - exact) < 0.02 and off < 0.05:
            right[name] = side
        else:
            print(f"{name}: left out, loss {loss:.4f} for {exact:.4f}, gradient off by {off:.3f}")
    return right


def loss_and_gradient(side: Loss, q: Tensor, k: Tensor, queue: Tensor) -> tuple[float, Tensor]:
    q = q.clone().requires_grad_()
    loss = side(q, k.to(q.dtype), queue)
    return float(loss.detach()), torch.autograd.grad(loss, q)[0].double()


def once(side: Loss, inputs: list[Inputs], i: int) -> None:
    q, k, queue = inputs[i % len(inputs)]
    q.grad = None
    side(q, k, queue).backward()


def seconds(run: Run, calls: int, on_gpu: bool) -> float:
    """Seconds of one of `calls` calls."""
    if not on_gpu:
        start = time.perf_counter()
        for i in range(calls):
            run(i)
        return (time.perf_counter() - start) / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for i in range(calls):
        run(i)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / calls / 1000


def captured(inputs: list[Inputs]) -> Run:
    """Ours as a captured training step runs it: one CUDA graph for each set of inputs."""
    graphs = []
    for one in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.autograd.grad(ours(*one), one[0])
        graphs.append(graph)
    return lambda i: graphs[i % len(graphs)].replay()


def speeds(on_gpu: bool, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large product, and bytes a second of reading (the sum of a large tensor)."""
    device, size, count = ("cuda", 8192, 1 << 28) if on_gpu else ("cpu", 2048, 1 << 25)
    square = torch.randn(size, size, device=device, dtype=dtype)
    long = torch.zeros(count, device=device)
    out = torch.empty_like(square)

    def multiply(_: int) -> None:
        torch.mm(square, square, out=out)

    def read(_: int) -> None:
        long.sum()

    product, reading = (min(seconds(run, 5, on_gpu) for _ in range(6)) for run in (multiply, read))
    return 2 * size**3 / product, 4 * count / reading


def peak_memory(side: Loss, inputs: list[Inputs]) -> int:
    """Bytes beyond the inputs at the worst moment of a forward and backward: allocated on a GPU, resident on a CPU."""
    on_gpu = inputs[0][0].is_cuda
    inputs[0][0].grad = None
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
    once(side, inputs, 0)
    if on_gpu:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def memory_alone(name: str) -> int:
    """peak_memory of "ours" or "eager" at the largest size, for a process that has held nothing before."""
    inputs = make_inputs(MEMORY_ROWS, 65536, "cpu", torch.float32)[:1]
    side = {"ours": ours, "eager": eager}[name]
    once(side, [tuple(x[:64].detach().requires_grad_(i == 0) for i, x in enumerate(inputs[0]))], 0)  # type: ignore[list-item]
    return peak_memory(side, inputs)


def memory_on_cpu() -> dict[str, float]:
    """GiB of ours and of eager, each in a process of its own, and their ratio."""
    figures = {}
    for name in ("ours", "eager"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures[f"gib_{name}_{MEMORY_ROWS}"] = pool.apply_async(memory_alone, (name,)).get(300) / 2**30
    ratio = figures[f"gib_ours_{MEMORY_ROWS}"] / figures[f"gib_eager_{MEMORY_ROWS}"]
    return {**figures, f"memory_of_eager_{MEMORY_ROWS}": ratio}


def measure_batch(n: int, keys: int, dtype: torch.dtype, options: Options, floor: float) -> dict[str, object]:
    """The figures of one batch size, printed as a table."""
    on_gpu = torch.cuda.is_available()
    inputs = make_inputs(n, keys, "cuda" if on_gpu else "cpu", dtype)
    sides = check(make_sides(on_gpu), *inputs[0])
    runs: dict[str, Run] = {name: functools.partial(once, side, inputs) for name, side in sides.items()}
    for run in runs.values():  # compiles, and fills the allocator's pools
        seconds(run, 2, on_gpu)
    if on_gpu:
        runs["ours, graph"] = captured(inputs)
    calls = {name: max(1, round(options.seconds / seconds(run, 3, on_gpu))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, calls[name], on_gpu))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\nN {n}, K {keys}, D {DIM}, {dtype}; floor {floor * 1e3:.3f} ms")
    for name, median in medians.items():
        spread = (max(times[name]) - min(times[name])) / median
        print(f"  {name:12} {median * 1e3:9.3f} ms  {median / medians['ours']:6.2f} of ours' time  ±{spread:.0%}")
    figures: dict[str, object] = {f"ms_{n}": {name: 1e3 * value for name, value in medians.items()}}
    figures[f"of_floor_{n}"] = floor / medians["ours"]
    figures |= {f"vs_{name}_{n}": value / medians["ours"] for name, value in medians.items() if name != "ours"}
    if on_gpu:
        memory = peak_memory(sides["ours"], inputs) / peak_memory(sides["eager"], inputs)
        figures[f"memory_of_eager_{n}"] = memory
        print(f"  memory beyond the inputs, of eager's: {memory:.4f}")
    return figures


def measure(options: Options) -> int:
    on_gpu = torch.cuda.is_available()
    dtype, keys, batches = (torch.bfloat16, 65536, (256, 1024, 4096)) if on_gpu else (torch.float32, 16384, (64, 256))
    operations, bandwidth = speeds(on_gpu, dtype)
    figures: dict[str, object] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "keys": keys, "dtype": str(dtype),
        "tflops": operations / 1e12, "gbps": bandwidth / 1e9,
    }  # fmt: skip
    for n in batches:
        floor = max(4 * 2 * n * keys * DIM / operations, keys * DIM * dtype.itemsize / bandwidth)
        figures |= measure_batch(n, keys, dtype, options, floor)
    if not on_gpu:
        figures |= memory_on_cpu()
        print(f"memory at N {MEMORY_ROWS}, K 65536, of eager's: {figures[f'memory_of_eager_{MEMORY_ROWS}']:.4f}")
    record.append("similarity", figures)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: measure(parse(Options, sys.argv[1:]))))
