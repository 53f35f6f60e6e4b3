"""torchvision's state dicts (.pth), and which of its networks an encoder is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn

from fasttrain.networks.libraries import CLASSIFIERS
from fasttrain.weights.exported import Loaded, Source, refused


class Recipe(NamedTuple):
    """How torchvision makes a network: one of the names in torchvision.models, its arguments, the modules that are
    put in the place of its own, and how many layers are kept of others."""

    function: str
    arguments: dict[str, Any]
    modules: dict[str, nn.Module]
    kept: dict[str, int]

    def made(self) -> nn.Module:
        """The network, with fresh weights."""
        model = getattr(torchvision.models, self.function)(**self.arguments)
        for name, module in self.modules.items():
            setattr(model, name, module)
        for name, count in self.kept.items():
            setattr(model, name, getattr(model, name)[:count])
        return model

    def lines(self) -> list[str]:
        """The same as Python, of `model`."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        made = f"model = torchvision.models.{self.function}({arguments})"
        kept = [f"model.{name} = model.{name}[:{count}]" for name, count in self.kept.items()]
        return [made, *(f"model.{name} = torch.nn.{module}" for name, module in self.modules.items()), *kept]


def recipe(source: Source) -> Recipe | None:
    """How torchvision makes this encoder; None where it can't."""
    encoder, arch = source.encoder, source.options.arch
    if arch == "small" or ":" in arch:
        return None
    classifiers = {name: each for name, each in encoder.named_children() if name in CLASSIFIERS}
    identities: dict[str, nn.Module] = {
        name: nn.Identity() for name, each in classifiers.items() if isinstance(each, nn.Identity)
    }
    kept = {name: len(each) for name, each in classifiers.items() if isinstance(each, nn.Sequential)}
    if isinstance(encoder, torchvision.models.VisionTransformer):
        arguments = {
            "image_size": encoder.image_size, "patch_size": encoder.patch_size,
            "num_layers": len(encoder.encoder.layers), "num_heads": encoder.encoder.layers[0].num_heads,
            "hidden_dim": encoder.hidden_dim, "mlp_dim": encoder.mlp_dim,
        }  # fmt: skip
        return Recipe("VisionTransformer", arguments, identities, kept)
    stem: dict[str, nn.Module] = {}
    if source.options.cifar_stem:
        stem = {"conv1": nn.Conv2d(3, 64, 3, 1, 1, bias=False), "maxpool": nn.Identity()}
    made: dict[str, Any] = {"name": arch}
    if getattr(encoder, "aux_logits", None) is False:
        made["aux_logits"] = False
    if isinstance(encoder, torchvision.models.MaxVit):
        made["input_size"] = (source.preprocessing.size,) * 2
    return Recipe("get_model", made, {**stem, **identities}, kept)


def write(source: Source, path: Path) -> dict[str, Any]:
    """A state dict under torchvision's names, without its classifier."""
    made = recipe(source)
    if made is None:
        raise refused("torchvision", source, "it is none of torchvision's networks")
    torch.save(source.encoder.state_dict(), path)  # with its version, without which MNASNet takes none
    loaded = f"model.load_state_dict(torch.load({path.name!r}, weights_only=True))"
    lines = ["import torch, torchvision", *made.lines(), loaded, "model.eval()"]
    return {"load": lines, "features": "model(pixels)", "transform": source.preprocessing.lines()}


def load(source: Source, path: Path) -> Loaded:
    made = recipe(source)
    assert made is not None, "it was written"
    model = made.made()
    model.load_state_dict(torch.load(path, weights_only=True))
    return Loaded(model.eval(), source.preprocessing.transform(), f"torchvision {torchvision.__version__}")
