"""Methods by name, and the contract between a method and everything else; see docs/adding-a-method.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fasttrain.methods.options import METHODS, MethodOptions, method_options

if TYPE_CHECKING:
    from fasttrain.methods.base import Method, Output, Progress, Sample

__all__ = ["METHODS", "Method", "MethodOptions", "Output", "Progress", "Sample", "method_options"]


if not TYPE_CHECKING:  # with it, a checker takes any name for one of them

    def __getattr__(name: str) -> Any:  # noqa: ANN401
        """What a method is made of, once it is asked for: it needs torch, which options do not."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fasttrain.methods import base

        return getattr(base, name)
