"""What crosses from a loader to the views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """B decoded images of their own sizes, without padding.

    pixels: uint8, the RGB bytes of every image, H×W×3 row-major, among others' perhaps; in host memory or on the
    device. offset_B: int64, first byte of image b in it. height_B, width_B: int32. index_B: int64, place of the sample
    in the data set. label_B: int64, −1 for a sample without; None unless the loader was asked for labels. All but
    `pixels` are CPU tensors.
    replaced: how many of its samples stand in for others that can't be decoded.
    arrived: recorded behind the pixels' copy to the device, where they were copied there; it may be timed.
    `pixels` is a view of a buffer that the loader may use again: valid until the next batch is asked for.
    """

    pixels: Tensor
    offset_B: Tensor
    height_B: Tensor
    width_B: Tensor
    index_B: Tensor
    label_B: Tensor | None
    replaced: int = 0
    arrived: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self.index_B)
