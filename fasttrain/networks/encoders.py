"""Image encoders: vision transformers and one small network of our own, torchvision's, timm's, and anybody's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fasttrain.networks.libraries import check_own, lacking, outside_encoder, timm_encoder, torchvision_encoder
from fasttrain.networks.options import TIMM, WIDTHS, EncoderOptions, is_outside
from fasttrain.networks.vision_transformer import drop_paths, make_vision_transformer
from fasttrain.system.errors import UserError
from fasttrain.system.memory import is_full_memory

STEPS = 4, 7, 8, 14, 16, 28, 32, 224  # of whose multiples the sides are that encoders take
USUAL = 64, 96, 128, 160, 192, 224, 256, 320, 384, 448  # sides of views


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


class WrongSize(UserError):
    """An encoder takes no views of a size."""

    def __init__(self, arch: str, size: int, error: Exception) -> None:
        said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        super().__init__(f"--arch {arch} can't take views of {size} px: {said}")


def make_encoder(options: EncoderOptions, size: int) -> tuple[nn.Module, int]:
    """An encoder (N, 3, size, size) → (N, F) with fresh weights, and F. Its batch norm is plain.

    A classifier of torchvision's or timm's is left out. Raises UserError for an unknown --arch, for a stem, patches,
    heads or dropped paths that it lacks, and, with sizes that do, for a size it can't take.
    """
    try:
        encoder = _built(options, size)
        return encoder, feature_width(encoder, options.arch, size)
    except WrongSize as error:
        near = sizes_near(size, lambda side: takes(options, side, ()))
        raise UserError(f"{error}; {named(near)}") from error


def _built(options: EncoderOptions, size: int) -> nn.Module:
    try:
        encoder = _made(options, size)
    except Exception as error:  # a library may raise anything for a size
        if isinstance(error, UserError) or is_full_memory(error):
            raise
        raise WrongSize(options.arch, size, error) from error
    if options.cifar_stem:
        _give_cifar_stem(encoder, options.arch)
    return encoder


def _made(options: EncoderOptions, size: int) -> nn.Module:
    arch = options.arch
    if is_outside(arch) or arch.startswith(TIMM):
        if options.vit.vit_heads:
            raise lacking(arch, "vit_heads", options.vit.vit_heads)
        return (outside_encoder if is_outside(arch) else timm_encoder)(options, size)
    if arch in WIDTHS:
        encoder = make_vision_transformer(options, size)
    else:
        encoder = Small() if arch == "small" else torchvision_encoder(arch, size)
        check_own(encoder, options)
    if options.drop_path is not None and not drop_paths(encoder, options.drop_path) and options.drop_path:
        raise lacking(arch, "drop_path", options.drop_path)
    return encoder


def _give_cifar_stem(encoder: nn.Module, arch: str) -> None:
    first = getattr(encoder, "conv1", None)  # of torchvision's and timm's ResNets
    if not (isinstance(first, nn.Conv2d) and hasattr(encoder, "maxpool")):
        raise UserError(f"--cifar-stem is for ResNets whose stem is one convolution, not {arch!r}")
    encoder.conv1 = nn.Conv2d(3, first.out_channels, 3, 1, 1, bias=False)
    encoder.maxpool = nn.Identity()


def takes(options: EncoderOptions, size: int, others: Iterable[int]) -> bool:
    """Does an encoder for views of a size take them, and others?

    Tried without memory or arithmetic, unless it is one's own, which may look at numbers while it is made.
    """
    try:
        with torch.device("cpu" if is_outside(options.arch) else "meta"):
            check_sides(_built(options, size), options.arch, size, others)
            return True
    except Exception as error:  # of a library, or of what can't be without memory
        if is_full_memory(error):
            raise
        return False


def sizes_near(size: int, do: Callable[[int], bool]) -> list[int]:
    """The nearest sides of views, one below and one above, that do."""
    multiples = {side for step in STEPS for side in (size // step * step, size // step * step + step)}
    sides = sorted({*multiples, *USUAL} - {0, size})
    below, above = [side for side in reversed(sides) if side < size], [side for side in sides if side > size]
    return [side for part in (below, above) if (side := next(filter(do, part), 0))]


def named(sizes: list[int]) -> str:
    """What to do instead, for an error."""
    return f"{' or '.join(map(str, sizes))} px would do" if sizes else "no size near it would do"


@torch.no_grad()
def zero_init_residual(encoder: nn.Module) -> None:
    """Have every residual block of a ResNet begin as its shortcut: the scale of its last batch norm is 0
    (Goyal et al., arXiv 1706.02677, section 5.1).

    Before its momentum copy is made. Of torchvision and timm. Other encoders stay as they are, Small among them: it is
    too shallow to need it.
    """
    for block in encoder.modules():
        if isinstance(block, Bottleneck):
            block.bn3.weight.zero_()
        elif isinstance(block, BasicBlock):
            block.bn2.weight.zero_()
        elif hasattr(block, "zero_init_last"):  # timm's
            block.zero_init_last()  # type: ignore[operator]


def check_sides(encoder: nn.Module, arch: str, size: int, others: Iterable[int]) -> None:
    """Raises WrongSize for the first of other views' sides at which features have another width than at `size`, or
    there are none."""
    width = feature_width(encoder, arch, size)
    for side in others:
        if (found := feature_width(encoder, arch, side)) != width:
            raise WrongSize(arch, side, ValueError(f"it makes {found} features of them, and {width} of {size} px"))


@torch.no_grad()
def feature_width(encoder: nn.Module, arch: str, size: int) -> int:
    """Width of the features for views of a size, by a forward pass in evaluation mode.

    Raises WrongSize where it fails, and UserError for anything but features (N, F).
    """
    try:
        features = encoder.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:  # a stranger's network may raise anything
        if is_full_memory(error):
            raise
        raise WrongSize(arch, size, error) from error
    finally:
        encoder.train()
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 1:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"--arch {arch!r} gives {found}, not features of shape (N, F)")
    return features.shape[1]
