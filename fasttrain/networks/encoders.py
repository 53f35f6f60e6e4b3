"""Image encoders: torchvision's by name, vision transformers, and one small network of our own for a CPU."""

from __future__ import annotations

import difflib

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fasttrain.networks.options import WIDTHS, EncoderOptions
from fasttrain.networks.vision_transformer import check_own, make_vision_transformer
from fasttrain.system.errors import UserError


class _Block(nn.Module):
    """Two 3×3 convolutions with a shortcut (pre-activation-free basic block of ResNet, arXiv 1512.03385)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu_(self.bn1(self.conv1(x)))
        return torch.relu_(self.bn2(self.conv2(out)).add_(self.shortcut(x)))


class Small(nn.Sequential):
    """A ResNet of one basic block a stage, for views of about 32 px: (N, 3, S, S) → (N, 256)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        convolution = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        stem = nn.Sequential(convolution, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
        pairs = zip((widths[0], *widths), widths, strict=False)
        blocks = [_Block(before, width, 1 if i == 0 else 2) for i, (before, width) in enumerate(pairs)]
        super().__init__(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def make_encoder(options: EncoderOptions, size: int) -> tuple[nn.Module, int]:
    """An encoder (N, 3, size, size) → (N, F) with fresh weights, and F. Its batch norm is plain.

    options.arch: "small", one of WIDTHS, or any torchvision classification model's name; its classifier is left out.
    Raises UserError for an unknown name, for a stem, patches or heads the model lacks, and for a size it can't take.
    """
    arch = options.arch
    if arch in WIDTHS:
        encoder = make_vision_transformer(arch, size, options.vit)
    else:
        encoder = Small() if arch == "small" else _torchvision_encoder(arch)
        check_own(encoder, arch, options.vit)
    if options.cifar_stem:
        if not isinstance(encoder, torchvision.models.ResNet):
            raise UserError(f"--cifar-stem is for torchvision ResNets, not {arch!r}")
        encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        encoder.maxpool = nn.Identity()  # type: ignore[assignment]
    return encoder, feature_width(encoder, arch, size)


def _torchvision_encoder(arch: str) -> nn.Module:
    names = torchvision.models.list_models(module=torchvision.models)
    if arch not in names:
        near = difflib.get_close_matches(arch, [*WIDTHS, *names], 3) or ["resnet18", "resnet50"]
        raise UserError(
            f"unknown --arch {arch!r}: 'small', {', '.join(WIDTHS)} or a torchvision model, such as {', '.join(near)}"
        )
    options = {"init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(arch, weights=None, **options)
    for name in ("fc", "classifier", "heads", "head"):  # what torchvision calls the classifier
        if hasattr(model, name):
            setattr(model, name, nn.Identity())
            return model
    raise UserError(f"--arch {arch!r}: its classifier can't be told from its features")


@torch.no_grad()
def zero_init_residual(encoder: nn.Module) -> None:
    """Have every residual block of a torchvision ResNet begin as its shortcut: the scale of its last batch norm is 0
    (Goyal et al., arXiv 1706.02677, section 5.1).

    Before its momentum copy is made. Other encoders stay as they are, Small among them: it is too shallow to need it.
    """
    for block in encoder.modules():
        if isinstance(block, Bottleneck):
            block.bn3.weight.zero_()
        elif isinstance(block, BasicBlock):
            block.bn2.weight.zero_()


@torch.no_grad()
def feature_width(encoder: nn.Module, arch: str, size: int) -> int:
    """Width of the features for views of a size, by a forward pass in evaluation mode. Raises UserError if it fails."""
    try:
        features = encoder.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--arch {arch} can't take views of {size} px: {error}") from None
    finally:
        encoder.train()
    if features.dim() != 2:
        raise UserError(f"--arch {arch!r} gives features of shape {tuple(features.shape)}, not (N, F)")
    return features.shape[1]
