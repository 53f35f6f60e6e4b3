"""What DINO's teacher says of an image (arXiv 2104.14294, section 3.1): centred and sharpened probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

CENTRE_MOMENTUM = 0.9


@torch.no_grad()
def teacher_probabilities(logits_ANP: Tensor, centre_P: Tensor, temperature: float) -> Tensor:
    """softmax_p((g − c) / τ), (A, N, P), fp32 at least."""
    return torch.softmax((logits_ANP - centre_P) / temperature, 2)


def warmed_up(start: float, end: float, epoch: float, epochs: float) -> float:
    """A temperature that goes from `start` to `end` in so many epochs, linearly, and stays there."""
    return end if epoch >= epochs else start + (end - start) * epoch / epochs


@torch.no_grad()
def move_centre(centre_P: Tensor, mean_P: Tensor, good: Tensor) -> None:
    """c ← 0.9·c + 0.1·mean, in place. mean: of the teacher's logits of all ranks. good: 0-dim bool on the device; where
    false, nothing changes."""
    centre_P.copy_(torch.where(good, torch.lerp(mean_P, centre_P, CENTRE_MOMENTUM), centre_P))
