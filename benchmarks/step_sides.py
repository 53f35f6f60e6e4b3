"""The sides of the step benchmark, each in a process of its own: threads, allocator and graphs are each side's own."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pathlib
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor, nn

MOST_WORKERS = 32  # of a peer's DataLoader: MoCo's own default
TIMEOUT = 500  # seconds that a side may take for one round, compiling included


@dataclass(frozen=True)
class Case:
    """What is trained: all sides the same network, batch, queue and image size."""

    name: str
    arch: str
    cifar_stem: bool
    size: int
    batch_size: int
    queue_size: int
    head: Literal["mlp", "linear"]
    steps: int  # of a round
    method: str = "moco"  # of ours: this one, or another with its queue


@dataclass(frozen=True)
class Round:
    """What a side reports of some steps."""

    seconds: float
    parts: dict[str, float]  # seconds of a step
    memory: float  # most bytes so far: of the device, or of the process on a CPU


Steps = Callable[[int], None]


class Side:
    """A process that runs steps of one side when asked to."""

    def __init__(self, name: str, case: Case, data: pathlib.Path | None, folder: pathlib.Path | None) -> None:
        """name: "ours", "moco fp32", "moco amp" or "channels-last amp"; data, folder: shards, and their images as
        files; None for views that are made once."""
        self._loaded = data is not None
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, case, data, folder), daemon=False)
        self._process.start()
        theirs.close()

    def run(self, steps: int) -> Round:
        self._pipe.send(steps)
        if not self._pipe.poll(TIMEOUT):
            raise RuntimeError(f"a side of the benchmark did nothing for {TIMEOUT} s")
        return self._pipe.recv()

    def warm_up(self, steps: int) -> None:
        """Compile, fill buffers, and use up what a DataLoader has made ahead: two batches a worker."""
        self.run(steps + (2 * workers() if self._loaded else 0))

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def workers() -> int:
    """Processes of a peer's DataLoader."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def _serve(pipe: Connection, name: str, case: Case, data: pathlib.Path | None, folder: pathlib.Path | None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = Parts(device)
    run = fasttrain_steps(case, data, device, parts) if name == "ours" else _peer(name, case, folder, device)
    with contextlib.suppress(EOFError):
        while True:
            steps = pipe.recv()
            if device.type == "cuda":
                run(1)  # takes the memory again that it gave back at the end
            parts.clear()
            _wait(device)
            start = time.perf_counter()
            run(steps)
            _wait(device)
            seconds = (time.perf_counter() - start) / steps
            if device.type == "cuda":  # the sides share it, and take turns
                torch.cuda.empty_cache()
            pipe.send(Round(seconds, parts.seconds(steps), _memory(device)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Parts:
    """Time by part of a step, between marks on the device: nothing waits for it while steps run."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, object, object]] = []

    def clear(self) -> None:
        self._marks.clear()

    def _now(self) -> object:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def wrap(self, name: str, function: Any) -> Any:  # noqa: ANN401 a module calls as a function does
        @functools.wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def wrap_network(self, name: str, network: nn.Module) -> None:
        """Time a module's calls; from outside of what is compiled, where one has been compiled in place."""
        network._compiled_call_impl = self.wrap(name, network._compiled_call_impl or network._call_impl)  # type: ignore[method-assign]

    def seconds(self, steps: int) -> dict[str, float]:
        totals: dict[str, float] = {}
        for name, start, end in self._marks:
            took = start.elapsed_time(end) / 1000 if self._on_gpu else end - start  # type: ignore[attr-defined, operator]
            totals[name] = totals.get(name, 0.0) + took / steps
        return totals


def fasttrain_steps(case: Case, data: pathlib.Path | None, device: torch.device, parts: Parts) -> Steps:
    """The training step of fasttrain/jobs/train.py, its parts wrapped from outside."""
    from benchmarks.repeated import Repeated
    from fasttrain.config import make_config
    from fasttrain.engine.networks import make_networks
    from fasttrain.engine.optim import Schedule
    from fasttrain.engine.precision import DTYPES, fastest_precision
    from fasttrain.engine.ranks import Ranks
    from fasttrain.engine.step import TrainStep
    from fasttrain.engine.views import make_views
    from fasttrain.input import Order, open_dataset, open_loader, pixel_statistics
    from fasttrain.kernels.augment import Views
    from fasttrain.methods import Sample

    config = make_config(
        case.method, data=str(data), arch=case.arch, cifar_stem=case.cifar_stem, size=case.size, recipe="mocov1",
        batch_size=case.batch_size, queue_size=case.queue_size, head=case.head,
        precision=fastest_precision(device),
    )  # fmt: skip
    ranks = Ranks("auto")
    method: Any = make_networks(
        config.method, config.encoder, config.views, config.optimisation, config.machine, device, config.run.seed
    )
    for name, network in method.named_children():
        if name in ("encoder", "projector"):
            parts.wrap_network("query forward", network)
    method._keys = parts.wrap("key forward", method._keys)
    method.loss = parts.wrap("loss", method.loss)
    method.update = parts.wrap("EMA, queue", method.update)
    trainer = TrainStep(method, config.optimisation, device)
    trainer.forward_backward = parts.wrap("forward and backward", trainer.forward_backward)  # type: ignore[method-assign]
    trainer.optimizer.step = parts.wrap("optimizer", trainer.optimizer.step)  # type: ignore[method-assign]
    count, rates = 0, Schedule(config.optimisation, 1)(0)
    dtype = DTYPES[config.optimisation.precision]
    recipe = config.recipe

    if data is None:
        shape = (2, case.batch_size, case.size, case.size, 3)
        made = (torch.randn(shape, device=device).to(dtype).permute(0, 1, 4, 2, 3),)
        index_B = torch.arange(case.batch_size)

        def synthetic(steps: int) -> None:
            for _ in range(steps):
                trainer.forward_backward(Sample(made, None, index_B))
                trainer.update(0, rates)

        return synthetic

    store = Repeated(open_dataset(data, "train"), case.batch_size)
    loader = open_loader(store, Order(store.num_samples, case.batch_size), ranks.cores, "auto", device)
    mean, std = pixel_statistics(data, "auto")

    def epochs() -> Iterator[tuple[int, Any]]:
        epoch = 0
        while True:
            for batch in loader.epoch(epoch):
                yield epoch, batch
            epoch += 1

    batches = epochs()
    views: Views | None = None

    def loaded(steps: int) -> None:
        nonlocal views, count
        for _ in range(steps):
            with parts.part("data wait"):
                epoch, batch = next(batches)
            with parts.part("views"):
                views = make_views(batch, recipe, case.size, 0, epoch, mean, std, dtype, out=views)
            trainer.forward_backward(Sample(views, None, batch.index_B))
            trainer.update(count, rates)
            count += 1

    return loaded


def _peer(name: str, case: Case, folder: pathlib.Path | None, device: torch.device) -> Steps:
    from benchmarks.step_peers import MoCoLoop, Recipe, loaded_views
    from fasttrain.networks.encoders import make_encoder
    from fasttrain.networks.heads import linear_head, mlp_head
    from fasttrain.networks.options import EncoderOptions

    encoder, width = make_encoder(EncoderOptions(arch=case.arch, cifar_stem=case.cifar_stem), case.size)
    head = {"mlp": mlp_head, "linear": linear_head}[case.head]
    network = nn.Sequential(encoder, head(width, 128))
    recipe = Recipe(dim=128, queue_size=case.queue_size, ema=0.999, temperature=0.2, lr=0.03, weight_decay=1e-4)
    loop = MoCoLoop(network, recipe, device, amp="amp" in name, channels_last="channels-last" in name)
    pairs: Iterator[tuple[Tensor, Tensor]]
    if folder is None:
        made = torch.randn(2, case.batch_size, 3, case.size, case.size, device=device)
        pairs = iter(lambda: (made[0], made[1]), None)
    else:
        pairs = loaded_views(folder, case.size, case.batch_size, workers(), device)

    def run(steps: int) -> None:
        for _ in range(steps):
            loop.step(*next(pairs))

    return run
