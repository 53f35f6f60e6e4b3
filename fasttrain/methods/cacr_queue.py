"""CACR with a queue (arXiv 2105.03746): a query is attracted by the keys of its image's other views."""

from __future__ import annotations

import torch
from torch import nn

from fasttrain.losses.cacr import QueueCACR
from fasttrain.losses.regularisers import regularised, with_features
from fasttrain.methods.base import Output, Sample
from fasttrain.methods.moco import KeyMethod
from fasttrain.methods.options.cacr_queue import CACRQueueOptions
from fasttrain.system.collectives import own_rows


class CACRQueue(KeyMethod):
    """View 0's query against the keys of all other views and the queue, which takes view 1's keys. Regularisers and
    figures are of view 0 with view 1; compactness is of view 0 with each other one."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, options: CACRQueueOptions) -> None:
        super().__init__(encoder, projector, options)
        self._sharpness, self._temperature = options.sharpness, 0.5 / options.negative_sharpness

    def forward(self, sample: Sample) -> Output:
        query, *others = sample.views[0]
        keys, key_features = zip(*(self._keys_and_features(view) for view in others), strict=True)
        feature_NF = self.encoder(query)
        q_ND = self._query(feature_NF)
        own, regularisers = own_rows(len(q_ND)), self._options.regularisers
        positive_PND = torch.stack([k_MD[own] for k_MD in keys])
        with torch.autocast(q_ND.device.type, enabled=False):
            contrast = QueueCACR(self._temperature, positive_PND, self._sharpness)
            loss, terms = with_features(
                regularised(
                    contrast, regularisers, q_ND, positive_PND[0], keys[0], self.queue.keys_KD,
                    pairs=[(q_ND, k_ND) for k_ND in positive_PND],
                ),
                regularisers, [feature_NF], [key_features[0][own]],
            )  # fmt: skip
        return Output(loss, terms | {"queue_filled": self.queue.filled}, (keys[0],), feature_NF.detach())
