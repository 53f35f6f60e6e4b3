"""The queue of keys (MoCo, arXiv 1911.05722)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """The last K keys, L2-normalised rows (K, D); saved with the model, never read by the host.

    At first they are random, or, of an empty queue, 0.
    """

    keys_KD: Tensor
    pointer: Tensor
    written: Tensor

    def __init__(self, size: int, dim: int, empty: bool = False) -> None:
        super().__init__()
        keys_KD = torch.zeros(size, dim) if empty else nn.functional.normalize(torch.randn(size, dim), dim=1)
        self.register_buffer("keys_KD", keys_KD)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # rows that are keys

    @property
    def is_full(self) -> Tensor:
        """0-dim bool on the device: is every row a key?"""
        return self.written == len(self.keys_KD)

    @property
    def filled(self) -> Tensor:
        """0-dim fp32 on the device: the share of rows that are keys."""
        return self.written / len(self.keys_KD)

    @torch.no_grad()
    def enqueue(self, new_ND: Tensor, good: Tensor | None = None) -> None:
        """Replace the oldest keys by `new_ND`, wrapping at the end; of more than K new keys the last K stay.

        good: 0-dim bool on the device; where false, nothing changes. None: true.
        """
        size = self.keys_KD.shape[0]
        kept_ND = new_ND[-size:]
        first = new_ND.shape[0] - kept_ND.shape[0]
        rows_N = (self.pointer + torch.arange(first, new_ND.shape[0], device=new_ND.device)) % size
        kept_ND = kept_ND.to(self.keys_KD.dtype)
        if good is not None:
            kept_ND = torch.where(good, kept_ND, self.keys_KD[rows_N])
        self.keys_KD.index_copy_(0, rows_N, kept_ND)
        count = new_ND.shape[0] * (1 if good is None else good)
        self.pointer.copy_((self.pointer + count) % size)
        self.written.copy_((self.written + count).clamp(max=size))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # noqa: ANN401
        """What was saved before rows were counted: all that are not 0 count as keys."""
        if (keys_KD := state_dict.get(f"{prefix}keys_KD")) is not None:
            state_dict.setdefault(f"{prefix}written", keys_KD.any(1).sum())
        super()._load_from_state_dict(state_dict, prefix, *rest)
