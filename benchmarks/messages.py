"""What the ranks of a job send each other in a training step, by formula: held to what gloo sends (tests/engine).

W ranks, N images of each in a step, P trained parameters, D the width of what is compared, C channels of a batch norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from fasttrain.config import TrainConfig
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
    ranks: int  # that take part: W, or those of a machine
    sizes: tuple[float, ...]
    during: Literal["", "forward", "backward"] = ""

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, on average over the ranks: the least that can be, which rings reach."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (self.ranks - 1) / self.ranks * sum(self.sizes)


def messages(config: TrainConfig, method: Method, ranks: int, machine: int) -> list[Messages]:
    """Of a step of moco (xmoco without --cross batch), simclr or swav. machine: ranks of one. method: on any device,
    "meta" among them."""
    images = config.optimisation.batch_size // ranks
    own = FORMULAS[config.run.method](config, method, images, ranks)
    gradients = Messages("gradients", "all-reduce", ranks, _buckets(method), "backward")
    peers = {"sync": ranks, "machine": min(machine, ranks)}.get(config.encoder.batch_norm)
    return [gradients, *(_statistics(config, method, peers) if peers else ()), *own]


def _moco(config: TrainConfig, _method: Method, images: int, ranks: int) -> Iterator[Messages]:
    options: Any = config.method
    directions = 2 if options.symmetric else 1
    if config.encoder.batch_norm == "split":
        yield Messages("images", "all-to-all", ranks, directions * (images * _image(config),), "forward")
    yield Messages("keys", "all-gather", ranks, directions * (FLOAT * ranks * images * options.dim,))
    yield Messages("terms", "all-reduce", ranks, (6 * FLOAT,))


def _simclr(config: TrainConfig, _method: Method, images: int, ranks: int) -> Iterator[Messages]:
    options: Any = config.method
    rows = 2 * FLOAT * ranks * images * options.dim
    yield Messages("rows", "all-gather", ranks, (rows,))
    yield Messages("rows' gradients", "reduce-scatter", ranks, (rows,))
    yield Messages("rows again, for figures", "all-gather", ranks, (rows,))
    yield Messages("terms", "all-reduce", ranks, (5 * FLOAT,))


def _swav(config: TrainConfig, _method: Method, images: int, ranks: int) -> Iterator[Messages]:
    options: Any = config.method
    yield Messages("prototypes", "all-reduce", ranks, 4 * (2 * FLOAT * options.prototypes,))
    if options.queue_size:
        yield Messages("queue", "all-gather", ranks, (2 * FLOAT * ranks * images * options.dim,))
    yield Messages("terms", "all-reduce", ranks, ((3 + bool(options.queue_size)) * FLOAT,))


FORMULAS: dict[str, Callable[[TrainConfig, Method, int, int], Iterator[Messages]]] = {
    "moco": _moco, "xmoco": _moco, "simclr": _simclr, "swav": _swav,
}  # fmt: skip


def _statistics(config: TrainConfig, method: Method, peers: int) -> Iterator[Messages]:
    """Of each batch norm and pass: mean and variance of every peer, gathered; in backward two sums over the peers.

    An encoder passes once for each size of views and direction, a head once for each direction; MoCo's key networks as
    often, without a backward.
    """
    options: Any = config.method
    directions = 2 if getattr(options, "symmetric", False) else 1
    sizes = len(set(view_sides(config)))
    there: list[int] = []
    back: list[int] = []
    for name, network in method.named_children():
        found = [len(child.running_mean) for child in network.modules() if hasattr(child, "running_mean")]  # type: ignore[arg-type]
        found *= directions * (sizes if "encoder" in name else 1)
        there += found
        back += found if any(p.requires_grad for p in network.parameters()) else []
    yield Messages("statistics", "all-gather", peers, tuple(2 * FLOAT * peers * count for count in there))
    yield Messages("statistics' gradients", "all-reduce", peers, tuple(2 * FLOAT * count for count in back))


def view_sides(config: TrainConfig) -> tuple[int, ...]:
    """Of each view of an image, in pixels."""
    return sides(config.recipe, config.views.size)


def _image(config: TrainConfig) -> int:
    """Bytes of a view, which is in the step's precision: of two bytes on any GPU, unless it is to be fp32."""
    wide = config.optimisation.precision == "fp32"
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
