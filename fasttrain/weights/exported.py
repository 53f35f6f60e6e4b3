"""What every format of weights out is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor, nn

from fasttrain.networks.options import EncoderOptions
from fasttrain.system.errors import UserError
from fasttrain.weights.preprocessing import Preprocessing


class Source(NamedTuple):
    """An encoder (N, 3, size, size) → (N, F), in evaluation mode, fp32, on the CPU, and what it was made from."""

    encoder: nn.Module
    options: EncoderOptions
    preprocessing: Preprocessing


class Loaded(NamedTuple):
    """A file, read again by the library it is for.

    features: (N, 3, size, size) → (N, F), fp32. transform: an image to (3, size, size), as that library's users
    prepare it; None where it has no such thing. by: who has read it, and which version.
    """

    features: Callable[[Tensor], Tensor]
    transform: Callable[[Image.Image], Tensor] | None
    by: str


class Format(NamedTuple):
    """One of the formats that weights go out in.

    packages: without which there is none. folder: whether it is one, or a file. write makes it under a name, and
    returns what a person should know of how it is loaded; raises UserError for an encoder that it can't hold. load
    reads it again, strictly: a tensor too many or too few is an error of the library's.
    """

    packages: tuple[str, ...]
    folder: bool
    write: Callable[[Source, Path], dict[str, Any]]
    load: Callable[[Source, Path], Loaded]


def refused(to: str, source: Source, reason: str, others: str = "safetensors and onnx") -> UserError:
    """Of an encoder that a format can't hold, with the formats that can."""
    arch, stem = source.options.arch, " with --cifar-stem" if source.options.cifar_stem else ""
    others = f"timm, hf, {others}" if arch.startswith("timm:") and not stem else others
    return UserError(f"--to {to} can't take --arch {arch}{stem}: {reason}; {others} can")
