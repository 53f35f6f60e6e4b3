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

    Maps (N, C, H, W) are averaged over their positions. Of tokens (N, T, D) the class token is taken where the encoder
    has one (class_token or cls_token), else their mean. about: in words, what is made of what.
    """

    def __init__(self, encoder: nn.Module, name: str, size: int) -> None:
        """Raises UserError for a name that the encoder has not, and a submodule without one output of such a shape."""
        super().__init__()
        modules = {name: module for name, module in encoder.named_modules() if name}
        if name not in modules:
            near = difflib.get_close_matches(name, modules, 4) or list(modules)[-4:]
            raise UserError(f"--layer {name!r}: the encoder has no such layer; it has {', '.join(near)}, …")
        self._encoder, self._classes = encoder, _has_class_token(encoder)
        seen: list[object] = []
        with torch.no_grad(), modules[name].register_forward_hook(lambda _module, _inputs, out: seen.append(out)):
            encoder(torch.zeros(2, 3, size, size))
        if len(seen) != 1:
            times = f"runs {len(seen)} times for an image" if seen else "is not run as a module"
            raise UserError(f"--layer {name!r} {times}: name another one, such as that around it")
        if not isinstance(seen[0], Tensor) or seen[0].dim() not in (2, 3, 4) or len(seen[0]) != 2:
            raise UserError(f"--layer {name!r} gives no vector, map or tokens for each image: name another one")
        self.about = f"{name} gives {tuple(seen[0].shape[1:])} an image{self._said(seen[0].dim())}"
        modules[name].register_forward_hook(self._stop)

    def _said(self, dim: int) -> str:
        tokens = "the first token, the class token, is taken" if self._classes else "the mean of the tokens is taken"
        return {2: "", 3: f": {tokens}", 4: ": averaged over the last two dimensions"}[dim]

    def _stop(self, _module: nn.Module, _inputs: object, out: Tensor) -> None:
        if out.dim() == 3:
            out = out[:, 0] if self._classes else out.float().mean(1)
        raise _Reached(out.float().mean((2, 3)) if out.dim() == 4 else out)

    def forward(self, x: Tensor) -> Tensor:
        try:
            self._encoder(x)
        except _Reached as reached:
            return reached.features_NF
        raise AssertionError("the layer was not run")


def _has_class_token(encoder: nn.Module) -> bool:
    return any(getattr(encoder, name, None) is not None for name in ("class_token", "cls_token"))
