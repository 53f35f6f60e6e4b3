"""Activation checkpointing (Chen et al., arXiv 1604.06174): keep a stage's input, run the stage again in backward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint

from fasttrain.system.errors import UserError

WHOLE = 0.9  # a child with this part of a network's parameters is no stage but the network itself, under another name


def checkpoint_activations(encoder: nn.Module) -> None:
    """Have each stage of an encoder recompute its activations. Changes neither results, statistics nor state names.

    Raises UserError for an encoder whose stages can't be told.
    """
    found = stages(encoder)
    if not found:
        raise UserError("--checkpoint-activations: this encoder has no stages to recompute")
    for stage in found:
        stage.forward = functools.partial(_recomputed, stage, stage.forward)  # type: ignore[method-assign]


def stages(module: nn.Module) -> list[nn.Module]:
    """The parts of a network that follow one another and have two weight matrices or kernels at least.

    Where there is but one it is taken apart: to recompute all at once would save nothing.
    """
    total = sum(p.numel() for p in module.parameters())
    found = []
    for child in module.children():
        if sum(p.numel() for p in child.parameters()) > WHOLE * total or isinstance(child, nn.ModuleList):
            found += stages(child) or [child]
        elif sum(p.dim() > 1 for p in child.parameters()) > 1:
            found.append(child)
    return (len(found) == 1 and stages(found[0])) or found


def _recomputed(stage: nn.Module, forward: Callable, *inputs: object, **named: object) -> object:
    forward = functools.partial(forward, **named)
    if not stage.training:
        return forward(*inputs)
    contexts = (contextlib.nullcontext(), _statistics_untouched(stage))
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: contexts)


@contextlib.contextmanager
def _statistics_untouched(stage: nn.Module) -> Iterator[None]:
    """While a stage runs for the second time, its batch norms move copies of their running statistics."""
    own = [(child, dict(child._buffers)) for child in stage.modules() if child._buffers]
    for child, buffers in own:
        child._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for child, buffers in own:
            child._buffers.update(buffers)
