"""Methods by name. A method is one file and one entry here; see docs/adding-a-method.md."""

from __future__ import annotations

import torch

from fasttrain.config import TrainConfig
from fasttrain.methods.base import Method
from fasttrain.methods.moco import MoCo
from fasttrain.methods.xmoco import XMoCo
from fasttrain.networks.convolution import convert_convolutions
from fasttrain.networks.encoders import make_encoder
from fasttrain.networks.queue import Queue
from fasttrain.system.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of --precision
METHODS: dict[str, type[MoCo]] = {"moco": MoCo, "xmoco": XMoCo}


def make_method(config: TrainConfig) -> Method:
    """The method `config.method` names, with the weights that config.seed gives.

    Raises UserError for an unknown name.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown --method {config.method!r}; choose from: {', '.join(METHODS)}")
    torch.manual_seed(config.seed)
    encoder, width = make_encoder(config.arch, config.size, config.cifar_stem)
    return METHODS[config.method](encoder, width, config)


def channels_last(method: Method, device: torch.device) -> Method:
    """The method on a device, its convolution weights in the memory format the views are born in.

    A GPU multiplies with the queue in the step's precision, so the queue is kept in it there: half the memory to read.
    """
    if device.type == "cuda" and method.config.precision != "fp32":
        for module in method.modules():
            if isinstance(module, Queue):
                module.keys_KD = module.keys_KD.to(AUTOCAST[method.config.precision])
    if device.type == "cpu" and method.config.precision == "bf16":
        convert_convolutions(method.encoder)
    return method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
