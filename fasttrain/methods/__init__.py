"""Methods by name. A method is one file and one entry here; see docs/adding-a-method.md."""

from __future__ import annotations

import importlib

from fasttrain.methods.base import Method, MethodOptions, Output, Sample
from fasttrain.methods.moco import MoCoOptions
from fasttrain.methods.xmoco import XMoCoOptions
from fasttrain.system.errors import UserError

__all__ = ["METHODS", "Method", "MethodOptions", "Output", "Sample", "method_options"]

METHODS: dict[str, type[MethodOptions]] = {"moco": MoCoOptions, "xmoco": XMoCoOptions}


def method_options(name: str) -> type[MethodOptions]:
    """The options of the method of that name: one of METHODS, or "package.module:Class" for one from outside.

    Raises UserError for an unknown name, a module that is not there, and a class that is no MethodOptions.
    """
    if name in METHODS:
        return METHODS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        choices = f"{', '.join(METHODS)}, or package.module:Class of your own"
        raise UserError(f"unknown --method {name!r}; choose from: {choices}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--method {name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, MethodOptions)):
        raise UserError(f"--method {name}: {attribute} is not a dataclass that extends MethodOptions")
    return found
