"""Code of one's own, by the name of its module."""

from __future__ import annotations

import importlib
import os
import sys

from fasttrain.system.errors import UserError


def from_outside(name: str, option: str) -> object:
    """What "package.module:attribute" names, of the current folder or installed.

    option: that has this value, for the error. Raises UserError for a module or an attribute that is not there.
    """
    module, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:  # a command that is run by its path does not have it there
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{option} {name}: {error}") from error
