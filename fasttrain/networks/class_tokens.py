"""What DINO's linear classifier reads of an encoder (Caron et al., arXiv 2104.14294, appendix; eval_linear.py)."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from fasttrain.networks.vision_transformer import AnySize

BASE_WIDTH = 768  # of a ViT-B
LAST_BLOCKS = 4


class ClassTokens(nn.Module):
    """A vision transformer's class tokens after its last blocks and the final norm side by side, (N, 3, S, S) → (N, F).

    Of one as wide as ViT-B: the last block's, and the mean of its patch tokens. Ours, torchvision's and timm's.
    """

    def __init__(self, encoder: nn.Module, width: int) -> None:
        """width: of the encoder's tokens."""
        super().__init__()
        self.encoder, self._patches = encoder, width >= BASE_WIDTH
        self._blocks = 1 if self._patches else LAST_BLOCKS
        last = f"class tokens of the last {LAST_BLOCKS} blocks"
        self.about = "class token and mean of patch tokens of the last block" if self._patches else last

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._outputs(x)
        parts = [class_token_ND for class_token_ND, _ in outputs]
        if self._patches:
            parts.append(outputs[-1][1].mean(1))
        return torch.cat(parts, 1)

    def _outputs(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Class token (N, D) and patch tokens (N, T, D) after each of the last blocks."""
        if isinstance(self.encoder, AnySize):
            return [(tokens[:, 0], tokens[:, 1:]) for tokens in self.encoder.last_tokens(x, self._blocks)]
        found = self.encoder.forward_intermediates(  # type: ignore[operator]
            x, self._blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return [(prefix[:, 0], patches) for patches, prefix in found]


def dino_features(encoder: nn.Module, width: int) -> tuple[nn.Module, str]:
    """What a linear classifier of DINO's protocol reads, as a module, and in words: of encoders whose output is no
    class token, as of ResNets there, that output.

    width: of the encoder's output.
    """
    if not _has_class_token(encoder):
        return encoder, "encoder output"
    tokens = ClassTokens(encoder, width)
    return tokens, tokens.about


def _has_class_token(encoder: nn.Module) -> bool:
    """Is its output a class token, and can its tokens be told apart?"""
    if isinstance(encoder, AnySize):
        return True
    intermediates = getattr(encoder, "forward_intermediates", None)  # timm's
    if not intermediates or "return_prefix_tokens" not in inspect.signature(intermediates).parameters:
        return False
    # The output of BEiT and EVA is the mean of the patches: their class tokens are not trained, and have no norm.
    is_read = getattr(encoder, "global_pool", "") == "token"
    return is_read and getattr(encoder, "cls_token", None) is not None and getattr(encoder, "num_prefix_tokens", 0) > 0
