#!/usr/bin/env python3
"""InfoNCE with both terms over the queue, and NT-Xent over the batch: ours beside what PyTorch offers for it.

    python benchmarks/similarity.py

All forward and backward. Correctness comes first: no figure is printed for a side whose loss or gradient is wrong; it
is named, with the reason, and so is one that cannot run here. Then every round runs every side once, on inputs that
rotate through more memory than a cache holds (a queue's; NT-Xent, which is in nt_xent.py, has its features from the
network); medians over the rounds count. The floor is what the products and one read of the queue take at the speeds
measured in the same run. On a GPU in bf16, times by CUDA events: those of CUDA graphs count, for launches from Python
take longer than small batches, and stand beside them; our kernel is also timed with other tiles than it has. On a CPU
in fp32 and smaller, by the clock. Prints tables, appends a line to benchmarks/results/similarity.jsonl; the last line
of the output is JSON.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import nt_xent, record
from fasttrain.losses.queue import InfoNCE, QueueConsistency, QueueUniformity, queue_terms
from fasttrain.system.cli import finish, parse
from fasttrain.system.options import NotNegative, Options, Positive

TAU = 0.2  # of all three terms, as in the presets
DIM = 128
CACHE = 100_000_000  # bytes, more than the caches have
MEMORY_ROWS = 4096  # at which memory is compared, with a queue of 65,536
Loss = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]  # q, k, queue; or of NT-Xent z; the first takes the gradient
Exact = Callable[..., tuple[float, Tensor]]  # loss and gradient
Run = Callable[[], object]


@dataclass(frozen=True)
class SimilarityBenchmark(Options):
    """Time the losses over the queue beside eager PyTorch, torch.compile and its attention kernels."""

    rows: Positive[tuple[int, ...]] = ()
    """Queries, and half the rows of NT-Xent. None: 256, 1,024 and 4,096 on a GPU; 64 and 256 on a CPU, whose memory is
    then measured, too, with NT-Xent of 256 to 4,096."""
    keys: NotNegative[int] = 0
    """Keys in the queue; 0: 65,536 on a GPU, 16,384 on a CPU."""
    rounds: Positive[int] = 7
    """Rounds; each runs every side once. Medians over them count."""
    seconds: NotNegative[float] = 0.1
    """Time that one side takes in one round, about; at least one pass over the inputs."""


TERMS = InfoNCE(TAU), QueueConsistency(TAU, TAU), QueueUniformity(TAU)


def ours(q: Tensor, k: Tensor, queue: Tensor, impl: str = "auto") -> Tensor:
    contrast, consistency, uniformity = queue_terms(TERMS, q, k, queue, impl)
    return contrast + consistency + uniformity


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


def _as_attention(q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and keys (which are the values, too) as an attention of one head over one sequence takes them."""
    return torch.cat([q, k]).detach().to(queue.dtype)[None, None], queue[None, None]


def attention(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """The readout by PyTorch's flash attention, keys and values being the queue."""
    x, keys = _as_attention(q, k, queue)
    if queue.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(x, keys, keys, scale=1 / TAU)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, keys, keys, scale=1 / TAU)
    return _FromReadout.apply(q, k, queue, lse[0, 0], out[0, 0])


def cudnn(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """The readout by cuDNN's attention."""
    x, keys = _as_attention(q, k, queue)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(x, keys, keys, None, True, scale=1 / TAU)
    return _FromReadout.apply(q, k, queue, lse.flatten(), out[0, 0])


def make_flex() -> Loss:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        x, keys = _as_attention(q, k, queue)
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
    if on_gpu:  # on a CPU flex has no gradient-free entry that returns the log-sum-exp
        sides |= {"cudnn": cudnn, "flex": make_flex()}
    return sides


def make_tile_sides() -> dict[str, Loss]:
    """Ours on a GPU, with the tiles that many rows might have."""
    from fasttrain.kernels.similarity import gpu

    def with_tiles(tiles: gpu.Tiles) -> Loss:
        def loss(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
            with mock.patch.object(gpu, "tiles_for", return_value=tiles):
                return ours(q, k, queue)

        return loss

    blocks = ((128, 32, 8), (64, 64, 4), (128, 64, 8), (128, 128, 8))
    return {
        f"{rows}x{keys}, {warps} warps": with_tiles(gpu.Tiles(rows, keys, warps, 3)) for rows, keys, warps in blocks
    }


def make_inputs(n: int, keys: int, device: str, dtype: torch.dtype) -> list[Inputs]:
    """Sets of q, k (fp32) and queue whose queues together exceed the caches."""
    count = max(2, -(-CACHE // (keys * DIM * dtype.itemsize)))
    generator = torch.Generator(device).manual_seed(0)

    def rows(count: int) -> Tensor:
        return F.normalize(torch.randn(count, DIM, device=device, generator=generator), dim=1)

    return [(rows(n).requires_grad_(), rows(n), rows(keys).to(dtype)) for _ in range(count)]


def exact(q: Tensor, k: Tensor, queue: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient in fp64 of rows that are rounded to the queue's dtype, as all sides have them."""
    q, k = (x.detach().to(queue.dtype).double() for x in (q, k))
    side = functools.partial(ours, impl="reference")
    few = [slice(i, i + 64) for i in range(0, len(q), 64)]  # at once: N×K in fp64 would not fit everywhere
    losses, gradients = zip(*(loss_and_gradient(side, q[i], k[i], queue.double()) for i in few), strict=True)
    return statistics.mean(losses), torch.cat(gradients) / len(few)


def loss_and_gradient(side: Loss, first: Tensor, *others: Tensor) -> tuple[float, Tensor]:
    first = first.detach().clone().requires_grad_()
    loss = side(first, *others)
    return float(loss.detach()), torch.autograd.grad(loss, first)[0].double()


def check(side: Loss, one: Inputs, truth: tuple[float, Tensor]) -> None:
    """Raises ArithmeticError where loss or gradient are not `truth`."""
    loss, gradient = loss_and_gradient(side, *one)
    off = float((gradient - truth[1]).abs().max() / truth[1].abs().max())
    if not (abs(loss - truth[0]) < 0.02 and off < 0.05):
        raise ArithmeticError(f"loss {loss:.4f} for {truth[0]:.4f}, gradient off by {off:.3f}")


def once(side: Loss, one: Inputs) -> None:
    one[0].grad = None
    side(*one).backward()


def launched(side: Loss, inputs: list[Inputs]) -> Run:
    """A pass over all inputs, called from Python."""

    def run() -> None:
        for one in inputs:
            once(side, one)

    return run


def captured(side: Loss, inputs: list[Inputs]) -> Run:
    """A pass over all inputs as one CUDA graph, the way a captured training step runs the loss."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for one in inputs:
                torch.autograd.grad(side(*one), one[0])
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own one current
    return graph.replay


WAYS = {"graph": captured, "launched": launched}


def seconds(run: Run, calls: int, on_gpu: bool) -> float:
    """Seconds of one of `calls` calls."""
    if not on_gpu:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / calls / 1000


def ready(
    sides: dict[str, Loss], inputs: list[Inputs], ways: Sequence[str], exact: Exact
) -> dict[tuple[str, str], Run]:
    """(way, name) -> run of the sides that are right and run in all these ways; the others are named, and why."""
    truth = exact(*inputs[0])
    runs: dict[tuple[str, str], Run] = {}
    for name, side in sides.items():
        try:
            check(side, inputs[0], truth)  # compiles
            launched(side, inputs)()  # fills the allocator's pools
            runs |= {(way, name): WAYS[way](side, inputs) for way in ways}
        except Exception as error:  # wrong, not offered by this device or this version of torch, memory full
            print(f"{name}, N {len(inputs[0][0])}: left out, {_reason(error)}")
    return runs


def _reason(error: BaseException) -> str:
    """On one line. What failed within a capture comes second: the capture then fails, too."""
    lines = (f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:100]}" for e in (error, error.__context__) if e)
    return ", after ".join(lines)


def measure_sides(
    sides: dict[str, Loss], inputs: list[Inputs], ways: Sequence[str], options: SimilarityBenchmark,
    exact: Exact = exact,
) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """way -> name -> seconds of a forward and backward in each round."""
    on_gpu = inputs[0][0].is_cuda
    runs = ready(sides, inputs, ways, exact)
    calls = {key: max(1, round(options.seconds / seconds(run, 1, on_gpu))) for key, run in runs.items()}
    times: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    for _ in range(options.rounds):
        for (way, name), run in runs.items():
            times[way].setdefault(name, []).append(seconds(run, calls[way, name], on_gpu) / len(inputs))
    return times


def speeds(on_gpu: bool, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large product, and bytes a second of reading (the sum of a large tensor)."""
    device, size, count = ("cuda", 8192, 1 << 28) if on_gpu else ("cpu", 2048, 1 << 25)
    square = torch.randn(size, size, device=device, dtype=dtype)
    long = torch.zeros(count, device=device)
    out = torch.empty_like(square)

    multiply = functools.partial(torch.mm, square, square, out=out)
    product, reading = (min(seconds(run, 5, on_gpu) for _ in range(6)) for run in (multiply, long.sum))
    return 2 * size**3 / product, 4 * count / reading


def peak_memory(side: Loss, one: Inputs) -> int:
    """Bytes beyond the inputs at the worst moment of a forward and backward: allocated on a GPU, resident on a CPU."""
    on_gpu = one[0].is_cuda
    one[0].grad = None
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
        before = _resident("VmRSS")
    once(side, one)
    if on_gpu:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def memory_alone(name: str) -> int:
    """peak_memory of a side at the largest size, for a process that has held nothing before."""
    if name.startswith("nt_xent"):
        side: Loss = {"nt_xent ours": nt_xent.ours, "nt_xent eager": nt_xent.eager}[name]
        (z,), _ = nt_xent.make_inputs(MEMORY_ROWS, "cpu", torch.float32)
        once(side, (z[:128].detach().requires_grad_(),))
        return peak_memory(side, (z,))
    q, k, queue = make_inputs(MEMORY_ROWS, 65536, "cpu", torch.float32)[0]
    side = {"ours": ours, "eager": eager}[name]
    once(side, (q[:64].detach().requires_grad_(), k[:64], queue[:64]))
    return peak_memory(side, (q, k, queue))


def memory_on_cpu() -> dict[str, float]:
    """GiB of ours and of eager, each in a process of its own, and their ratio; the queue has 65,536 keys."""
    figures: dict[str, float] = {}
    for case in ("", "nt_xent "):
        gib = {}
        for name in ("ours", "eager"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                gib[name] = pool.apply_async(memory_alone, (case + name,)).get(300) / 2**30
        prefix = case.replace(" ", "_")
        figures |= {f"{prefix}gib_{name}_{MEMORY_ROWS}": value for name, value in gib.items()}
        figures[f"{prefix}memory_of_eager_{MEMORY_ROWS}"] = gib["ours"] / gib["eager"]
    return figures


def measure_batch(
    n: int, keys: int, dtype: torch.dtype, options: SimilarityBenchmark, floor: float
) -> dict[str, object]:
    """The figures of one batch size, printed as tables."""
    on_gpu = torch.cuda.is_available()
    inputs = make_inputs(n, keys, "cuda" if on_gpu else "cpu", dtype)
    sides = make_sides(on_gpu)
    print(f"\nN {n}, K {keys}, D {DIM}, {dtype}; floor {floor * 1e3:.3f} ms")
    figures, counted = compare(sides, inputs, n, "", options)
    if "ours" in counted:
        figures[f"of_floor_{n}"] = 1e3 * floor / counted["ours"]
    if on_gpu and 2 * n > 512:  # rows, of q and k; fewer have other tiles
        print("  our kernel with other tiles")
        times = measure_sides(make_tile_sides(), inputs, ("graph",), options)
        figures[f"ms_tiles_{n}"] = show(times, next(iter(times["graph"]), ""))["graph"]
    return figures


def measure_nt_xent(n: int, dtype: torch.dtype, options: SimilarityBenchmark) -> dict[str, object]:
    """The figures of NT-Xent over 2n rows, printed as tables."""
    on_gpu = torch.cuda.is_available()
    inputs = nt_xent.make_inputs(n, "cuda" if on_gpu else "cpu", dtype)
    sides = {"ours": nt_xent.ours, "eager": nt_xent.eager, "compile": torch.compile(nt_xent.eager, dynamic=False)}
    print(f"\nNT-Xent, 2N {2 * n}, D {nt_xent.DIM}, {dtype}")
    return compare(sides, inputs, n, "nt_xent_", options, nt_xent.exact)[0]


def compare(
    sides: dict[str, Loss], inputs: list[Inputs], n: int, prefix: str, options: SimilarityBenchmark,
    exact: Exact = exact,
) -> tuple[dict[str, object], dict[str, float]]:  # fmt: skip
    """Figures of "ours" beside the other sides, by names with this prefix, and the milliseconds that count."""
    on_gpu = inputs[0][0].is_cuda
    ms = show(measure_sides(sides, inputs, ("graph", "launched") if on_gpu else ("launched",), options, exact), "ours")
    counted = next(iter(ms.values()))  # of graphs, where there are
    figures: dict[str, object] = {f"{prefix}ms_{n}": counted}
    if on_gpu:
        figures[f"{prefix}ms_launched_{n}"] = ms["launched"]
    if "ours" in counted:
        figures |= {f"{prefix}vs_{name}_{n}": x / counted["ours"] for name, x in counted.items() if name != "ours"}
    if on_gpu and {"ours", "eager"} <= counted.keys():
        memory = peak_memory(sides["ours"], inputs[0]) / peak_memory(sides["eager"], inputs[0])
        figures[f"{prefix}memory_of_eager_{n}"] = memory
        print(f"  memory beyond the inputs, of eager's: {memory:.4f}")
    return figures, counted


def show(times: dict[str, dict[str, list[float]]], base: str) -> dict[str, dict[str, float]]:
    """Prints each side's medians, the first way's against the base's, with its spread. Returns the medians in ms."""
    ms = {way: {name: 1e3 * statistics.median(x) for name, x in of.items()} for way, of in times.items()}
    first = next(iter(ms))
    titles = "".join(f"{f'{way}, ms':>14}" for way in ms)
    print(f"  {'':18}{titles}   of {base}")
    for name, median in ms[first].items():
        columns = "".join(f"{of[name]:14.3f}" for of in ms.values())
        ratio = f"{median / ms[first][base]:6.2f}" if base in ms[first] else ""
        spread = 1e3 * (max(times[first][name]) - min(times[first][name])) / median
        print(f"  {name:18}{columns}   {ratio:6}  ±{spread:.0%}")
    return ms


def measure(options: SimilarityBenchmark) -> int:
    on_gpu = torch.cuda.is_available()
    dtype, keys = (torch.bfloat16, 65536) if on_gpu else (torch.float32, 16384)
    keys, batches = options.keys or keys, options.rows or ((256, 1024, 4096) if on_gpu else (64, 256))
    operations, bandwidth = speeds(on_gpu, dtype)
    figures: dict[str, object] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "keys": keys, "dtype": str(dtype),
        "tflops": operations / 1e12, "gbps": bandwidth / 1e9,
    }  # fmt: skip
    for n in batches:
        floor = max(4 * 2 * n * keys * DIM / operations, keys * DIM * dtype.itemsize / bandwidth)
        try:
            figures |= measure_batch(n, keys, dtype, options, floor)
        except RuntimeError as error:  # of CUDA, or memory is full: the other sizes' figures are still worth having
            print(f"N {n}: left out, {_reason(error)}")
    for n in options.rows or (256, 1024, 4096):
        try:
            figures |= measure_nt_xent(n, dtype, options)
        except RuntimeError as error:
            print(f"NT-Xent, N {n}: left out, {_reason(error)}")
    if not (on_gpu or options.rows):
        figures |= memory_on_cpu()
        for case in ("", "nt_xent_"):
            ratio = figures[f"{case}memory_of_eager_{MEMORY_ROWS}"]
            print(f"{'NT-Xent, ' if case else ''}memory at N {MEMORY_ROWS}, of eager's: {ratio:.4f}")
    print(json.dumps(figures), flush=True)
    record.append("similarity", figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: measure(parse(SimilarityBenchmark, sys.argv[1:]))))
