"""Methods by name. A method is one file and one entry here; see docs/adding-a-method.md."""

from __future__ import annotations

from fasttrain.methods.barlow import BarlowOptions
from fasttrain.methods.base import Method, MethodOptions, Output, Progress, Sample
from fasttrain.methods.byol import BYOLOptions
from fasttrain.methods.co2 import CO2Options
from fasttrain.methods.dino import DINOOptions
from fasttrain.methods.moco import MoCoOptions
from fasttrain.methods.mocov3 import MoCoV3Options
from fasttrain.methods.nnclr import NNCLROptions
from fasttrain.methods.ressl import ReSSLOptions
from fasttrain.methods.sce import SCEOptions
from fasttrain.methods.simclr import SimCLROptions
from fasttrain.methods.simsiam import SimSiamOptions
from fasttrain.methods.supcon import SupConOptions
from fasttrain.methods.swav import SwAVOptions
from fasttrain.methods.vicreg import VICRegOptions
from fasttrain.methods.xmoco import XMoCoOptions
from fasttrain.system.errors import UserError
from fasttrain.system.outside import from_outside

__all__ = ["METHODS", "Method", "MethodOptions", "Output", "Progress", "Sample", "method_options"]

METHODS: dict[str, type[MethodOptions]] = {
    "moco": MoCoOptions,
    "xmoco": XMoCoOptions,
    "mocov3": MoCoV3Options,
    "co2": CO2Options,
    "ressl": ReSSLOptions,
    "sce": SCEOptions,
    "simclr": SimCLROptions,
    "nnclr": NNCLROptions,
    "byol": BYOLOptions,
    "simsiam": SimSiamOptions,
    "barlow": BarlowOptions,
    "vicreg": VICRegOptions,
    "swav": SwAVOptions,
    "dino": DINOOptions,
    "supcon": SupConOptions,
}


def method_options(name: str) -> type[MethodOptions]:
    """The options of the method of that name: one of METHODS, or "package.module:Class" for one from outside, of the
    current folder or installed.

    Raises UserError for an unknown name, a module that is not there, and a class that is no MethodOptions with views.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        choices = f"{', '.join(METHODS)}, or package.module:Class of your own"
        raise UserError(f"unknown --method {name!r}; choose from: {choices}")
    found = from_outside(name, "--method")
    if not (isinstance(found, type) and issubclass(found, MethodOptions) and hasattr(found, "views")):
        raise UserError(f"--method {name}: it is not a dataclass that extends MethodOptions and has views")
    return found
