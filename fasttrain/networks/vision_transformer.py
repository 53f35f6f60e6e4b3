"""Vision transformers (arXiv 2010.11929) as MoCo v3 (arXiv 2104.02057) and DINO (arXiv 2104.14294) train them.

torchvision's network, under its names, with fixed or learned positions, for views of several sizes, and in the sizes
that these papers use. Letters: N images, T tokens (the class token first), D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth

from fasttrain.networks.options import WIDTHS, EncoderOptions
from fasttrain.system.errors import UserError

DEPTH = 12
WIDTH_OF_HEAD = 64
BASE = 10000  # of fixed positions' frequencies


class _Size(NamedTuple):
    """Of a network: image and patch sides in pixels, heads, width."""

    image: int
    patch: int
    heads: int
    width: int


def make_vision_transformer(options: EncoderOptions, size: int) -> nn.Module:
    """An encoder (N, 3, S, S) → (N, D), of WIDTHS, with fresh weights, for views of side S: `size` and others.

    Raises ValueError for a size that its patches don't divide, UserError for heads that don't divide its width.
    """
    width = WIDTHS[options.arch]
    patch = options.patch_size or (4 if size <= 32 else 8 if size <= 64 else 16)
    heads = options.vit.vit_heads or width // WIDTH_OF_HEAD
    if width % heads:
        raise UserError(f"--vit-heads {heads} does not divide the width of --arch {options.arch}, {width}")
    _check_divided(patch, size)
    return _VisionTransformer(_Size(size, patch, heads, width), options.vit.vit_positions == "learned")


def take_any_size(network: torchvision.models.VisionTransformer) -> None:
    """Have torchvision's network take views of any size that its patches divide, and compute as ours do."""
    network.__class__ = AnySize
    _lighten(network)


def _lighten(network: torchvision.models.VisionTransformer) -> None:
    for block in network.encoder.layers:
        block.__class__ = _Block
    network.encoder.layers[-1].__class__ = _LastBlock


def _check_divided(patch: int, *sides: int) -> None:
    if any(side % patch for side in sides):
        raise ValueError(f"its patches of {patch} px don't divide them")


class AnySize(torchvision.models.VisionTransformer):
    """Features are the class token after the final norm."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, D). Raises ValueError where the patches don't divide H and W."""
        return self.encoder.ln(self.encoder.layers(self._embedded(x))[:, 0])

    def last_tokens(self, x: Tensor, count: int) -> list[Tensor]:
        """(N, 3, H, W) → all tokens, (N, T, D) each, after each of the last `count` blocks and the final norm."""
        tokens, outputs = self._embedded(x), []
        for block in self.encoder.layers:
            tokens = _Block.forward(block, tokens)  # the last one's own forward gives the class token alone
            outputs.append(tokens)
        return [self.encoder.ln(tokens) for tokens in outputs[-count:]]

    def _embedded(self, x: Tensor) -> Tensor:
        """(N, T, D), what the first block is given."""
        _check_divided(self.patch_size, *x.shape[2:])
        patches = self.conv_proj(x)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches.flatten(2).mT], 1)
        return tokens + self._positions(patches.shape[2], patches.shape[3])

    def _positions(self, rows: int, columns: int) -> Tensor:
        """(1, T, D) of a grid of patches."""
        positions, side = self.encoder.pos_embedding, self.image_size // self.patch_size
        if rows == columns == side:
            return positions
        if not isinstance(positions, nn.Parameter):
            return fixed_positions(self.hidden_dim, (rows, columns), side, positions.device)
        grid = positions[:, 1:].mT.unflatten(2, (side, side))
        grid = F.interpolate(grid, (rows, columns), mode="bicubic")
        return torch.cat([positions[:, :1], grid.flatten(2).mT], 1)


class _VisionTransformer(AnySize):
    """State names are torchvision's, without heads."""

    def __init__(self, size: _Size, learned: bool) -> None:
        super().__init__(size.image, size.patch, DEPTH, size.heads, size.width, 4 * size.width, num_classes=1)
        self.heads = nn.Identity()  # type: ignore[assignment]
        _lighten(self)
        self._initialise()
        if not learned:
            del self.encoder.pos_embedding
            side = size.image // size.patch
            fixed = fixed_positions(size.width, (side, side), side)
            self.encoder.register_buffer("pos_embedding", fixed)

    @torch.no_grad()
    def _initialise(self) -> None:
        """MoCo v3's: Xavier-uniform weights, those of queries, keys and values and the patches' as matrices of their
        own; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                for weight in module.in_proj_weight.chunk(3):
                    nn.init.xavier_uniform_(weight)
        assert isinstance(self.conv_proj, nn.Conv2d)
        nn.init.xavier_uniform_(self.conv_proj.weight.flatten(1))
        nn.init.zeros_(self.conv_proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.class_token, std=1e-6)
        nn.init.trunc_normal_(self.encoder.pos_embedding, std=0.02)


def fixed_positions(width: int, grid: tuple[int, int], own_side: int, device: torch.device | None = None) -> Tensor:
    """Positions (1, T, D), fp32, of a class token, 0, and of a grid of patches (rows, columns), row by row.

    Channels are sin and cos of the column, then sin and cos of the row, D/4 frequencies BASE^(−4i/D) each (MoCo v3;
    its code has rows and columns exchanged). A grid of another side than the network's own covers the same field, as
    in interpolation: patch i of n stands at (i + ½)·own_side/n − ½.
    """
    frequencies = BASE ** -(torch.arange(width // 4, device=device) * (4 / width))
    rows, columns = ((torch.arange(n, device=device) + 0.5) * (own_side / n) - 0.5 for n in grid)
    angles = [
        places.flatten()[:, None] * frequencies for places in reversed(torch.meshgrid(rows, columns, indexing="ij"))
    ]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
    return F.pad(patches, (0, 0, 1, 0))[None]


class _Block(EncoderBlock):
    """torchvision's block, without the copies that nn.MultiheadAttention makes of queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) → (N, T, D)"""
        attention = self.self_attention
        qkv = F.linear(self.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        return self._attended(x, *self._by_head(qkv, 3))

    def _by_head(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(N, T, parts·D) → parts of (N, heads, T, D/heads)"""
        return x.unflatten(2, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def _attended(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.self_attention.out_proj(attended))
        return x + self.mlp(self.ln_2(x))


class _LastBlock(_Block):
    """The class token alone, all that is read: of the other tokens, only keys and values, a sixth of a block's work."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) → (N, 1, D)"""
        parts, normed = [x.shape[2], 2 * x.shape[2]], self.ln_1(x)
        query_weight, weight = self.self_attention.in_proj_weight.split(parts)
        query_bias, bias = self.self_attention.in_proj_bias.split(parts)
        query = self._by_head(F.linear(normed[:, :1], query_weight, query_bias), 1)
        return self._attended(x[:, :1], *query, *self._by_head(F.linear(normed, weight, bias), 2))


def patch_projection(encoder: nn.Module) -> nn.Module | None:
    """A vision transformer's first layer, under torchvision's name or timm's; None of other encoders."""
    if isinstance(encoder, torchvision.models.VisionTransformer):
        return encoder.conv_proj
    return getattr(getattr(encoder, "patch_embed", None), "proj", None) if hasattr(encoder, "blocks") else None


def freeze_patches(encoder: nn.Module) -> None:
    """Keep a vision transformer's patch projection as it was drawn, for stable training (MoCo v3).

    Before its optimizer and its momentum copy are made. Other encoders have none, and stay as they are.
    """
    if (projection := patch_projection(encoder)) is not None:
        projection.requires_grad_(False)


def drop_paths(encoder: nn.Module, rate: float) -> bool:
    """Stochastic depth (arXiv 1603.09382): in training, an image skips a residual branch by a chance that grows
    linearly over the blocks, from 0 to `rate`.

    In torchvision's vision transformers, ours among them, and in what has its StochasticDepth already; whether the
    encoder is one of these.
    """
    if isinstance(encoder, torchvision.models.VisionTransformer):
        for block in encoder.encoder.layers:
            block.dropout = block.mlp[-1] = StochasticDepth(0.0, "row")
    paths = [module for module in encoder.modules() if isinstance(module, StochasticDepth)]
    for number, path in enumerate(paths):
        path.p = rate * number / max(1, len(paths) - 1)
    return bool(paths)


def keep_paths(encoder: nn.Module) -> None:
    """Have no image skip a branch, of torchvision's or of timm's encoders."""
    for module in encoder.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):  # timm's DropPath
            module.drop_prob = 0.0  # type: ignore[assignment]


def dropped_paths(encoder: nn.Module) -> float:
    """The chance, in training, that an image skips the branch that is skipped most often, as keep_paths knows them."""
    rates = [
        module.p if isinstance(module, StochasticDepth) else getattr(module, "drop_prob", None)
        for module in encoder.modules()
    ]
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)
