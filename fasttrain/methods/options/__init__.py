"""Options of methods by name. They import no torch: it takes seconds, which --help and a mistyped option need not."""

from __future__ import annotations

from fasttrain.methods.options.bacon import BaConOptions
from fasttrain.methods.options.barlow import BarlowOptions
from fasttrain.methods.options.base import MethodOptions
from fasttrain.methods.options.byol import BYOLOptions
from fasttrain.methods.options.cacr_queue import CACRQueueOptions
from fasttrain.methods.options.co2 import CO2Options
from fasttrain.methods.options.dino import DINOOptions
from fasttrain.methods.options.hiclr import HiCLROptions
from fasttrain.methods.options.hydra import HydraOptions
from fasttrain.methods.options.moco import MoCoOptions
from fasttrain.methods.options.mocov3 import MoCoV3Options
from fasttrain.methods.options.multi_view import CACROptions, MVDHELOptions, MVInfoNCEOptions
from fasttrain.methods.options.nnclr import NNCLROptions
from fasttrain.methods.options.ressl import ReSSLOptions
from fasttrain.methods.options.sce import SCEOptions
from fasttrain.methods.options.sepclr import SepCLROptions
from fasttrain.methods.options.simclr import SimCLROptions
from fasttrain.methods.options.simsiam import SimSiamOptions
from fasttrain.methods.options.supcon import SupConOptions
from fasttrain.methods.options.swav import SwAVOptions
from fasttrain.methods.options.vicreg import VICRegOptions
from fasttrain.methods.options.xmoco import XMoCoOptions
from fasttrain.system.errors import UserError
from fasttrain.system.outside import from_outside

__all__ = ["METHODS", "MethodOptions", "method_options"]

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
    "mv-infonce": MVInfoNCEOptions,
    "mv-dhel": MVDHELOptions,
    "cacr": CACROptions,
    "cacr-queue": CACRQueueOptions,
    "hiclr": HiCLROptions,
    "hydra": HydraOptions,
    "bacon": BaConOptions,
    "sepclr": SepCLROptions,
}


def method_options(name: str) -> type[MethodOptions]:
    """The options of the method of that name: one of METHODS, or "package.module:Class" for one from outside, of the
    current folder or installed.

    Raises UserError for an unknown name, a module that is not there, and a class that is no MethodOptions with views.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    if ":" not in str(name):
        choices = f"{', '.join(METHODS)}, or package.module:Class of your own"
        raise UserError(f"unknown --method {name!r}; choose from: {choices}")
    found = from_outside(str(name), "--method")
    if not (isinstance(found, type) and issubclass(found, MethodOptions) and hasattr(found, "views")):
        raise UserError(f"--method {name}: it is not a dataclass that extends MethodOptions and has views")
    return found
