"""Encoders made elsewhere: by torchvision and timm, by name, and by a function of one's own."""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
from typing import Any

import torchvision
from torch import nn

from fasttrain.networks.options import TIMM, WIDTHS, EncoderOptions
from fasttrain.networks.vision_transformer import take_any_size
from fasttrain.system.errors import UserError
from fasttrain.system.options import flag
from fasttrain.system.outside import from_outside

CLASSIFIERS = "fc", "classifier", "heads", "head"  # what torchvision calls them
TIMM_NAMES = {"patch_size": "patch_size", "drop_path": "drop_path_rate"}  # of our options
# what Python says of an argument that a builder does not take, or sets itself
REFUSED = re.compile(r"(?:unexpected|multiple values for) keyword argument(?:\(s\): \[| )'(\w+)'")


def torchvision_encoder(arch: str, size: int) -> nn.Module:
    """A classification model of torchvision without its classifier. Raises UserError for an unknown name, and what
    torchvision raises for a size."""
    names = torchvision.models.list_models(module=torchvision.models)
    if arch not in names:
        near = difflib.get_close_matches(arch, [*WIDTHS, *names], 3) or ["resnet18", "resnet50"]
        raise UserError(
            f"unknown --arch {arch!r}: 'small', {', '.join(WIDTHS)}, a torchvision model, such as {', '.join(near)}, "
            "timm:NAME, or package.module:function of your own"
        )
    given: dict[str, Any] = {}
    if arch in ("googlenet", "inception_v3"):  # whose auxiliary classifiers would be a part of what they give
        given = {"init_weights": True, "aux_logits": False}
    elif arch.startswith("vit_"):
        given = {"image_size": size}
    elif arch.startswith("maxvit"):
        given = {"input_size": (size, size)}
    model = torchvision.models.get_model(arch, weights=None, **given)
    if isinstance(model, torchvision.models.VisionTransformer):
        take_any_size(model)
    for name in CLASSIFIERS:
        if hasattr(model, name):
            setattr(model, name, _without_linear(getattr(model, name)))
            return model
    raise UserError(f"--arch {arch!r}: its classifier can't be told from its features")


def _without_linear(classifier: nn.Module) -> nn.Module:
    """What of a classifier makes features (N, F) of maps: ConvNeXt's and MaxViT's layers before the linear one."""
    first = list(itertools.takewhile(lambda layer: not isinstance(layer, nn.Linear), classifier.children()))
    return nn.Sequential(*first) if any(isinstance(layer, nn.Flatten) for layer in first) else nn.Identity()


def timm_encoder(options: EncoderOptions, size: int) -> nn.Module:
    """A model of timm without its classifier, for views of a size, and of others where it can interpolate positions.

    Raises UserError where timm or the model is missing, or has no such option, and what timm raises for a size.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"--arch {options.arch} needs the package {error.name}: pip install timm") from None
    name = options.arch.removeprefix(TIMM)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3) or ["resnet50", "vit_small_patch16_224"]
        raise UserError(f"unknown --arch {options.arch!r}: timm has others, such as {', '.join(near)}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # for the tag, which says nothing of the network
        tagged = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")) or "it without a tag"
        raise UserError(f"unknown --arch {options.arch!r}: timm has {tagged}") from None
    asked = {"patch_size": options.patch_size or None, "drop_path": options.drop_path}
    given: dict[str, Any] = {"img_size": size, "dynamic_img_size": True}
    given |= {TIMM_NAMES[name]: value for name, value in asked.items() if value is not None}
    while True:  # without what the model does not take
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, **given)
        except TypeError as error:
            refused = REFUSED.search(str(error))
            if not refused or refused[1] not in given:
                raise
            del given[refused[1]]
            for option in asked:
                if TIMM_NAMES[option] == refused[1] and asked[option]:
                    raise lacking(options.arch, option, asked[option]) from None


def outside_encoder(options: EncoderOptions, size: int) -> nn.Module:
    """What package.module:function gives, called with `size`, `patch_size` and `drop_path` where it has parameters of
    these names. Raises UserError for what can't be called so, or gives no module, and whatever the function raises."""
    function = from_outside(options.arch, "--arch")
    if not callable(function):
        raise UserError(f"--arch {options.arch}: it is no function")
    asked = {"patch_size": options.patch_size or None, "drop_path": options.drop_path}
    given = {"size": size} | {name: value for name, value in asked.items() if value is not None}
    signature = inspect.signature(function)
    for name in given.keys() - signature.parameters.keys():
        if given.pop(name) and name != "size":
            raise lacking(options.arch, name, asked[name])
    try:
        signature.bind(**given)
    except TypeError as error:
        raise UserError(f"--arch {options.arch}: {error}; it may have parameters size, patch_size, drop_path") from None
    encoder = function(**given)
    if not isinstance(encoder, nn.Module):
        raise UserError(f"--arch {options.arch}: it gives no torch.nn.Module but {type(encoder).__name__}")
    return encoder


def check_own(encoder: nn.Module, options: EncoderOptions) -> None:
    """Raises UserError for patches or heads that another network, with its own or with none, does not have."""
    own = {}
    if isinstance(encoder, torchvision.models.VisionTransformer):
        own = {"patch_size": encoder.patch_size, "vit_heads": encoder.encoder.layers[0].num_heads}
    for name, asked in (("patch_size", options.patch_size), ("vit_heads", options.vit.vit_heads)):
        if asked not in (0, own.get(name)):
            raise lacking(options.arch, name, asked)


def lacking(arch: str, name: str, asked: float | None) -> UserError:
    """The error of an option that an encoder can't have."""
    return UserError(f"{flag(name)} {asked} is not for --arch {arch}: encoders such as vit_small have it")
