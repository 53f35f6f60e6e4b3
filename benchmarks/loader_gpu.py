"""The loader on a GPU: is the copy of the pixels hidden behind steps, do steps wait, and how fast DALI decodes there.

The loop is training's, without its losses: threads decode, batches are copied ahead, their views are made on the GPU,
and a ResNet-50 takes one of them forward and backward in bf16, channels-last.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Iterable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.repeated import Repeated
from fasttrain.engine.views import make_views
from fasttrain.input import IMAGENET_MEAN, IMAGENET_STD, Batch, Loader, Order, open_dataset, open_loader
from fasttrain.kernels.augment import Views
from fasttrain.networks.encoders import make_encoder
from fasttrain.networks.options import EncoderOptions
from fasttrain.run.clock import BatchClock, seconds_of
from fasttrain.system.errors import UserError
from fasttrain.views.spec import RECIPES

SIZE = 224  # px, of a view
WARM_UP, STEPS = 10, 20  # steps; some of the first compile kernels
TABLE = 1024  # bytes an image, at most, of what is copied to the GPU besides pixels

Interval = tuple[float, float]  # start and end


def measure(data: pathlib.Path, threads: int, batch_size: int) -> dict[str, object]:
    """Figures of this machine's GPU.

    h2d_overlap: part of the time of copying pixels (h2d_ms, of h2d_copies) in which kernels run; None if the profiler
    saw no copy. wait_share: part of the time in which the GPU has nothing to do for want of a batch.
    mixed_images_per_sec: of our DaliLoader, decoding on the GPU; None without DALI.
    """
    loop = _Loop(_loader(data, threads, batch_size, "auto"))
    loop.run(WARM_UP)
    wait_share = loop.run(STEPS)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        loop.run(STEPS)
    loop.loader.close()
    copies, kernels = intervals(trace_of(profiler), TABLE * batch_size)
    total, hidden = sum(end - start for start, end in copies) / 1e3, overlap(copies, kernels) / 1e3
    share = round(hidden / total, 3) if total else None
    print(
        f"{len(copies)} copies of pixels in {STEPS} steps: {total:.2f} ms, {hidden:.2f} ms of them while kernels run "
        f"(share: {share}); steps wait for batches {wait_share:.1%} of the time"
    )
    return {
        "device": torch.cuda.get_device_name(), "h2d_overlap": share, "h2d_copies": len(copies),
        "h2d_ms": round(total, 3), "wait_share": round(wait_share, 4),
        "mixed_images_per_sec": _mixed_rate(data, threads, batch_size),
    }  # fmt: skip


def overlap(copies: Iterable[Interval], kernels: Iterable[Interval]) -> float:
    """The length of all copies together, as far as at least one kernel runs meanwhile."""
    busy: list[Interval] = []
    for start, end in sorted(kernels):
        if busy and start <= busy[-1][1]:
            busy[-1] = busy[-1][0], max(busy[-1][1], end)
        else:
            busy.append((start, end))
    return sum(max(0.0, min(end, last) - max(start, first)) for start, end in copies for first, last in busy)


def intervals(trace: dict, least_bytes: int) -> tuple[list[Interval], list[Interval]]:
    """Copies of least_bytes or more from the host to the device, and kernels, in µs.

    trace: as a profiler exports it, in Chrome's format: it has the bytes of a copy, which a profiler's events() lack.
    """
    copies, kernels = [], []
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            kernels.append((event["ts"], event["ts"] + event["dur"]))
        elif event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"] and event["args"]["bytes"] >= least_bytes:
            copies.append((event["ts"], event["ts"] + event["dur"]))
    return copies, kernels


def trace_of(profiler: profile) -> dict:
    with tempfile.TemporaryDirectory(prefix="loader-trace-") as folder:
        path = pathlib.Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))


class _Loop:
    """Steps on one batch after the other, epoch after epoch."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self._clock = loader, BatchClock(torch.device("cuda"))
        self._batches = self._clock.timed(_endless(loader))
        encoder, _ = make_encoder(EncoderOptions(arch="resnet50"), SIZE)
        self._encoder = encoder.to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._views: Views | None = None

    def run(self, steps: int) -> float:
        """Takes some steps; returns the part of the time in which they waited for batches, by the GPU's clock."""
        began = time.perf_counter()
        for batch in itertools.islice(self._batches, steps):
            self._step(batch)
        torch.cuda.synchronize()
        return seconds_of(self._clock.take()).data / (time.perf_counter() - began)

    def _step(self, batch: Batch) -> None:
        normal = IMAGENET_MEAN, IMAGENET_STD
        self._views = make_views(batch, RECIPES["mocov2"], SIZE, 0, 0, *normal, torch.bfloat16, out=self._views)
        with torch.autocast("cuda", torch.bfloat16):
            features_BF = self._encoder(self._views[0][0])
        features_BF.float().square().mean().backward()
        self._encoder.zero_grad(set_to_none=True)


def _mixed_rate(data: pathlib.Path, threads: int, batch_size: int) -> float | None:
    """Images per second of DALI's decoder on the GPU ("mixed"), in our loader."""
    try:
        loader = _loader(data, threads, batch_size, "dali")
    except UserError as error:
        print(f"DALI's decoding on the GPU was not measured: {error}")
        return None
    decoded = [(time.perf_counter(), len(batch)) for batch in itertools.islice(_endless(loader), WARM_UP + STEPS)]
    loader.close()
    images = sum(count for _, count in decoded[WARM_UP:])
    return round(images / (decoded[-1][0] - decoded[WARM_UP - 1][0]), 1)


def _loader(data: pathlib.Path, threads: int, batch_size: int, kind: str) -> Loader:
    store = Repeated(open_dataset(data, "train"), batch_size)
    order = Order(store.num_samples, batch_size)
    return open_loader(store, order, threads, kind, torch.device("cuda"))


def _endless(loader: Loader) -> Iterator[Batch]:
    return itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
