"""fasttrain: pre-training of image encoders with XMoCo and its relatives.

What other people's programs use of it stands in __all__, and is imported when it is first asked for: to import this
package alone costs nothing, torch least of all. (`train` is in fasttrain.jobs.train: fasttrain.train is the command.)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fasttrain.system.caches import choose_caches

if TYPE_CHECKING:
    from fasttrain.config import make_config
    from fasttrain.input import open_dataset
    from fasttrain.kernels.similarity import readout
    from fasttrain.trained import load_encoder
    from fasttrain.view_loader import ViewLoader

__version__ = "0.1.0"
__all__ = ["ViewLoader", "load_encoder", "make_config", "open_dataset", "readout"]

_HOMES = {
    "ViewLoader": "view_loader",
    "load_encoder": "trained",
    "make_config": "config",
    "open_dataset": "input",
    "readout": "kernels.similarity",
}

choose_caches()  # before numba and the others are imported, which then keep to it


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
