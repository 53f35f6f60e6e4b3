"""The output of a layer inside an encoder as features: one vector an image."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn

from fasttrain.system.errors import UserError


class _Reached(Exception):
    """The layer's features are there; what comes after it in the encoder need not run."""

    def __init__(self, features_NF: Tensor) -> None:
        self.features_NF = features_NF


class Layer(nn.Module):
    """An encoder up to one of its submodules, (N, 3, S, S) → (N, F).

    Maps (N, C, H, H) and (N, H, H, C) are averaged over their positions: those of a square image are a square. Of
    tokens (N, T, D) the first is taken where the encoder's class token is in it, else their mean. about: in words, what
    is made of what.
    """

    def __init__(self, encoder: nn.Module, name: str, size: int) -> None:
        """Raises UserError for a name that the encoder has not, and a submodule without one output of such a shape."""
        super().__init__()
        modules = {name: module for name, module in encoder.named_modules() if name}
        if name not in modules:
            near = difflib.get_close_matches(name, modules, 4) or list(modules)[-4:]
            raise UserError(f"--layer {name!r}: the encoder has no such layer; it has {', '.join(near)}, …")
        self._encoder = encoder
        out = _probed(encoder, modules[name], name, size)
        self._mean_over, said = _positions(out, name)
        self._first_token = out.dim() == 3 and _starts_with_class_token(encoder, modules[name], name, size, out)
        if self._first_token:
            said = ": the first token, the class token, is taken"
        self.about = f"{name} gives {tuple(out.shape[1:])} an image{said}"
        modules[name].register_forward_hook(self._stop)

    def _stop(self, _module: nn.Module, _inputs: object, out: Tensor) -> None:
        if self._first_token:
            out = out[:, 0]
        elif self._mean_over:
            out = out.float().mean(self._mean_over)
        raise _Reached(out)

    def forward(self, x: Tensor) -> Tensor:
        try:
            self._encoder(x)
        except _Reached as reached:
            return reached.features_NF
        raise AssertionError("the layer was not run")


@torch.no_grad()
def _probed(encoder: nn.Module, layer: nn.Module, name: str, size: int) -> Tensor:
    """What the layer gives of two black images. Raises UserError where that is no output of one shape an image."""
    seen: list[object] = []
    with layer.register_forward_hook(lambda _module, _inputs, out: seen.append(out)):
        encoder(torch.zeros(2, 3, size, size))
    if len(seen) != 1:
        times = f"runs {len(seen)} times for an image" if seen else "is not run as a module"
        raise UserError(f"--layer {name!r} {times}: name another one, such as that around it")
    (out,) = seen
    if not isinstance(out, Tensor) or out.dim() not in (2, 3, 4) or len(out) != 2:
        raise UserError(f"--layer {name!r} gives no vector, map or tokens for each image: name another one")
    return out.clone()  # what follows may write into it


def _positions(out: Tensor, name: str) -> tuple[tuple[int, ...], str]:
    """The dimensions of an output (N, …) that are positions, and in words that they are averaged over."""
    if out.dim() == 2:
        return (), ""
    if out.dim() == 3:
        return (1,), ": the mean of the tokens is taken"
    _, first, second, third = out.shape
    if (first == second) == (second == third):
        shape = tuple(out.shape[1:])
        raise UserError(f"--layer {name!r} gives {shape} an image, which does not tell channels from positions")
    if second == third:
        return (2, 3), ": averaged over the last two dimensions"
    return (1, 2), ": averaged over the first two dimensions"


@torch.no_grad()
def _starts_with_class_token(encoder: nn.Module, layer: nn.Module, name: str, size: int, out: Tensor) -> bool:
    """Whether another class token (class_token or cls_token) makes another first token of what the layer gives."""
    token = getattr(encoder, "class_token", None)
    token = getattr(encoder, "cls_token", None) if token is None else token
    if token is None:
        return False
    before = token.clone()
    token.copy_(torch.linspace(-1, 1, token.numel()).view_as(token))
    try:
        return not torch.equal(_probed(encoder, layer, name, size)[:, 0], out[:, 0])
    finally:
        token.copy_(before)
