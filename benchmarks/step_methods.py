"""A step of each method beside the passes through the encoder that its paper asks for, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SECONDS = 900  # in which a method has to be measured


class Passes(NamedTuple):
    """Of the encoder for each image: views with a gradient and without, and small crops, which have one. On CIFAR-10
    SwAV and DINO go without these."""

    gradient: int
    without: int
    small: int = 0


PASSES = {
    "moco": Passes(1, 1), "xmoco": Passes(1, 1), "co2": Passes(1, 1), "ressl": Passes(1, 1), "sce": Passes(1, 1),
    "simclr": Passes(2, 0), "supcon": Passes(2, 0), "simsiam": Passes(2, 0), "barlow": Passes(2, 0),
    "vicreg": Passes(2, 0), "nnclr": Passes(2, 0), "byol": Passes(2, 2), "mocov3": Passes(2, 2),
    "swav": Passes(2, 0, 6), "dino": Passes(2, 2, 8),
    "mv-infonce": Passes(4, 0), "mv-dhel": Passes(4, 0), "cacr": Passes(5, 0), "cacr-queue": Passes(1, 4),
    "hiclr": Passes(3, 1), "hydra": Passes(2, 0), "bacon": Passes(2, 0), "sepclr": Passes(4, 0),
}  # fmt: skip


class Cost(NamedTuple):
    """Medians over the rounds, in seconds; bytes at the most."""

    step: float
    passes: float
    memory: float


def measure(names: list[str], case: Any, rounds: int) -> Iterator[tuple[str, Cost]]:  # noqa: ANN401 a step_sides.Case
    """The cost of each method, one after the other."""
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            yield name, alone.apply_async(_measure, (name, case, rounds)).get(SECONDS)


def _measure(name: str, case: Any, rounds: int) -> Cost:  # noqa: ANN401 as above
    """In every round first the passes, then a step, so that what slows the machine down slows both."""
    from fasttrain.config import make_config
    from fasttrain.engine.networks import make_networks
    from fasttrain.engine.optim import Schedule
    from fasttrain.engine.precision import DTYPES, fastest_precision
    from fasttrain.engine.ranks import Ranks
    from fasttrain.engine.step import TrainStep
    from fasttrain.methods import Progress, Sample
    from fasttrain.views.spec import sides

    ranks = Ranks("auto")
    device, precision = ranks.device, fastest_precision(ranks.device)
    dtype = DTYPES[precision]
    needed = {"background": (0,)} if name == "sepclr" else {}  # what has no default
    config = make_config(
        name, "cifar10" if case.cifar_stem else "imagenet", arch=case.arch, cifar_stem=case.cifar_stem, size=case.size,
        batch_size=case.batch_size, epochs=100, warmup_epochs=1.0, precision=precision, **needed,
    )  # fmt: skip
    method = make_networks(
        config.method, config.encoder, config.views, config.optimisation, config.machine, device, config.run.seed
    )
    step, rates = TrainStep(method, config.optimisation, device), Schedule(config.optimisation, 1)(50)
    size_V = sides(config.recipe, case.size)
    groups = tuple(_views(size_V.count(side), case.batch_size, side, device, dtype) for side in dict.fromkeys(size_V))
    label_B = torch.arange(case.batch_size, device=device) % 100 if config.method.needs_labels else None
    given = Sample(groups, label_B, torch.arange(case.batch_size), Progress(50.0, 100.0))

    def passes() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            both = 2 if getattr(config.method, "symmetric", False) else 1  # views that are query and key in turn
            _pass(method.encoder, groups[0][0], both * PASSES[name].gradient, both * PASSES[name].without)
            if len(groups) > 1:
                _pass(method.encoder, groups[1].flatten(0, 1), 1, 0)
        method.encoder.zero_grad()

    def whole() -> None:
        step.forward_backward(given)
        step.update(0, rates)

    found = [(_seconds(passes, device), _seconds(whole, device)) for _ in range(rounds + 1)][1:]
    passed, stepped = (statistics.median(column) for column in zip(*found, strict=True))
    return Cost(stepped, passed, _memory(device))


def _views(count: int, images: int, side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, images, side, side, 3, device=device).to(dtype).permute(0, 1, 4, 2, 3)


def _pass(encoder: nn.Module, view: Tensor, gradient: int, without: int) -> None:
    for _ in range(gradient):
        encoder(view).float().sum().backward()
    with torch.no_grad():
        for _ in range(without):
            encoder(view)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(found: dict[str, Cost], images: int) -> dict[str, dict[str, float]]:
    """Prints the table; returns its figures by method."""
    first = next(iter(found.values()))
    print(f"{'':10}{'images/s':>10}{'of ' + next(iter(found)):>12}{'step / passes':>15}{'GiB':>8}")
    figures = {}
    for name, cost in found.items():
        figures[name] = {
            "images_per_sec": images / cost.step, "relative": first.step / cost.step,
            "step_vs_passes": cost.step / cost.passes, "gib": cost.memory / 2**30,
        }  # fmt: skip
        rate, relative, ratio, gib = figures[name].values()
        print(f"{name:10}{rate:10.1f}{relative:12.2f}{ratio:15.2f}{gib:8.2f}")
    return figures
