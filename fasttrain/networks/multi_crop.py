"""Views of several sizes: a few full ones and cheap small crops (multi-crop; SwAV, arXiv 2006.09882, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def encode_crops(encoder: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Features (V·N, F) of all views, one view after the other, by a forward pass for each size.

    views: a tensor (V, N, 3, S, S) for each size, channels-last; nothing of it is copied.
    """
    return torch.cat([encoder(group.flatten(0, 1)) for group in views])
