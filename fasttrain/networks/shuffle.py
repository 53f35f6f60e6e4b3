"""Shuffled keys (MoCo, arXiv 1911.05722, section 3.3): key and query of an image are normalised with different images.

The images of all ranks are dealt out anew, each rank encodes what it was dealt, and as keys go to every rank anyway,
they are put back in order there. Every rank draws the same permutation, so nothing has to be said about it. An image is
sent to one rank; MoCo's own all-gather sends it to all. Images travel while something else is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.system.collectives import common_generator, exchange_rows, gather_rows, rank, sent, world_size


class Deal(NamedTuple):
    """One permutation of W·N = M images, as rank r needs it; int64 on the CPU."""

    sent_N: Tensor  # own images in the order they leave: by rank that encodes them
    send_W: list[int]  # how many to each rank
    receive_W: list[int]  # how many from each rank
    place_N: Tensor  # which of those received, which are in the order of ranks, comes at each place
    back_M: Tensor  # where each image's key is among all the ranks' keys


def deal(order_M: Tensor, own: int, ranks: int) -> Deal:
    """What rank `own` does so that image order_M[p] (numbered in rank order) is encoded at place p (likewise)."""
    order_WN = order_M.view(ranks, -1)
    images = order_WN.shape[1]
    source_WN = order_WN // images
    leaves_WN = source_WN == own
    return Deal(
        order_WN[leaves_WN] - own * images,
        leaves_WN.sum(1).tolist(),
        source_WN[own].bincount(minlength=ranks).tolist(),
        source_WN[own].argsort(stable=True).argsort(),
        order_M.argsort(),
    )


class Shuffled:
    """The images of all ranks on their way to those that encode them; with one process, in another order."""

    def __init__(self, view: Tensor) -> None:
        """view (N, 3, S, S), channels-last. N must be the same on every rank, and so must the state of
        common_generator, which draws the permutation. The host does not wait for the device."""
        ranks, images = world_size(), len(view)
        dealt = deal(torch.randperm(ranks * images, generator=common_generator), rank(), ranks)
        index = sent(torch.cat([dealt.sent_N, dealt.place_N, dealt.back_M]), view.device)
        sent_N, self._place_N, self._back_M = index.split([images, images, ranks * images])
        self._rows = exchange_rows(view.permute(0, 2, 3, 1).index_select(0, sent_N), dealt.send_W, dealt.receive_W)

    def encoded(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows (M, D) of the images of all ranks, in rank order, each encoded among images drawn from all ranks.

        encode takes a view to rows (N, D).
        """
        rows = self._rows()
        if world_size() > 1:
            rows = rows.index_select(0, self._place_N)
        return gather_rows(encode(rows.permute(0, 3, 1, 2))).index_select(0, self._back_M)
