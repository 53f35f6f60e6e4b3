"""What the ranks of a job send each other in a training step, by formula: held to what gloo sends (tests/engine).

W ranks, N images of each in a step, P trained parameters, D the width of what is compared, C channels of a batch norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from torch import nn

from fasttrain.config import TrainConfig
from fasttrain.engine.networks import AUTOCAST
from fasttrain.methods import Method
from fasttrain.views.spec import sides

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
FLOAT = 4  # bytes: weights, gradients, statistics and losses are fp32
MIB = 2**20


class Messages(NamedTuple):
    """Collectives of one kind in a step.

    sizes: bytes of each. Of an all-reduce, what is summed; of an all-gather, what every rank has in the end; of a
    reduce-scatter, what every rank has at first; of an all-to-all, what a rank deals out, of which it keeps 1/W.
    during: the pass of the networks that does not wait for them.
    """

    part: str
    kind: Kind
    sizes: tuple[float, ...]
    during: Literal["", "forward", "backward"] = ""

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends, on average over the ranks: the least that can be, which rings reach."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (ranks - 1) / ranks * sum(self.sizes)


def messages(config: TrainConfig, method: Method, ranks: int) -> list[Messages]:
    """Of a step of moco (xmoco without --cross batch), simclr or swav. method: on any device, "meta" among them."""
    own = FORMULAS[config.run.method](config, method, config.optimisation.batch_size // ranks, ranks)
    return [Messages("gradients", "all-reduce", _buckets(method), "backward"), *own]


def _moco(config: TrainConfig, method: Method, images: int, ranks: int) -> Iterator[Messages]:
    options: Any = config.method
    directions = 2 if options.symmetric else 1
    keys = FLOAT * ranks * images * options.dim
    if config.encoder.batch_norm == "split":
        yield Messages("images", "all-to-all", directions * (images * _image(config),), "forward")
    if config.encoder.batch_norm == "sync":
        forward, backward = _statistics(method.encoder, ranks)
        yield Messages("statistics", "all-gather", 2 * directions * forward)  # of queries and of keys
        yield Messages("statistics' gradients", "all-reduce", directions * backward)
    yield Messages("keys", "all-gather", directions * (keys,))
    yield Messages("terms", "all-reduce", (6 * FLOAT,))


def _simclr(config: TrainConfig, method: Method, images: int, ranks: int) -> Iterator[Messages]:
    yield from _synchronised(config, method, ranks, passes=1)
    options: Any = config.method
    rows = 2 * FLOAT * ranks * images * options.dim
    yield Messages("rows", "all-gather", (rows,))
    yield Messages("rows' gradients", "reduce-scatter", (rows,))
    yield Messages("rows again, for figures", "all-gather", (rows,))
    yield Messages("terms", "all-reduce", (5 * FLOAT,))


def _swav(config: TrainConfig, method: Method, images: int, ranks: int) -> Iterator[Messages]:
    options: Any = config.method
    yield from _synchronised(config, method, ranks, passes=len(set(view_sides(config))))
    yield Messages("prototypes", "all-reduce", 4 * (2 * FLOAT * options.prototypes,))
    if options.queue_size:
        yield Messages("queue", "all-gather", (2 * FLOAT * ranks * images * options.dim,))
    yield Messages("terms", "all-reduce", ((3 + bool(options.queue_size)) * FLOAT,))


FORMULAS: dict[str, Callable[[TrainConfig, Method, int, int], Iterator[Messages]]] = {
    "moco": _moco, "xmoco": _moco, "simclr": _simclr, "swav": _swav,
}  # fmt: skip


def _synchronised(config: TrainConfig, method: Method, ranks: int, passes: int) -> Iterator[Messages]:
    """passes: of the encoder, one for each size of views; the head has one."""
    if config.encoder.batch_norm != "sync":
        return
    forward, backward = _statistics(method.encoder, ranks)
    forward_head, backward_head = _statistics(method.projector, ranks)
    yield Messages("statistics", "all-gather", passes * forward + forward_head)
    yield Messages("statistics' gradients", "all-reduce", passes * backward + backward_head)


def _statistics(network: nn.Module, ranks: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each batch norm: mean and variance of every rank, gathered; in backward two sums over the ranks."""
    channels = [len(child.running_mean) for child in network.modules() if hasattr(child, "running_mean")]  # type: ignore[arg-type]
    return tuple(2 * FLOAT * ranks * count for count in channels), tuple(2 * FLOAT * count for count in channels)


def view_sides(config: TrainConfig) -> tuple[int, ...]:
    """Of each view of an image, in pixels."""
    return sides(config.views.recipe_for(config.method.views), config.views.size)


def _image(config: TrainConfig) -> int:
    """Bytes of a view, which is in the step's precision."""
    wide = config.optimisation.precision not in AUTOCAST
    return 3 * view_sides(config)[0] ** 2 * (4 if wide else 2)


def _buckets(method: Method) -> tuple[int, ...]:
    """As DDP fills them: the last parameters first, the first bucket closed above 1 MiB, others
    above 25 MiB. Which are in which depends on the order in which gradients come, their sum does not."""
    sizes, limit = [0], MIB
    for parameter in reversed([p for p in method.parameters() if p.requires_grad]):
        if sizes[-1] >= limit:
            sizes.append(0)
            limit = 25 * MIB
        sizes[-1] += FLOAT * parameter.numel()
    return tuple(sizes)
