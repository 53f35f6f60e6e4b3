"""HiCLR (arXiv 2211.13466) for images: queries of views that grow stronger, each led by the one before it."""

from __future__ import annotations

import torch
from torch import nn

from fasttrain.losses.hierarchical import hierarchical
from fasttrain.losses.regularisers import regularised, with_features
from fasttrain.methods.base import Output, Sample
from fasttrain.methods.moco import KeyMethod
from fasttrain.methods.options.hiclr import HiCLROptions
from fasttrain.system.collectives import own_rows


class HiCLR(KeyMethod):
    """Queries of all views but the last, the weakest first, against the last view's key and the queue. Regularisers and
    figures are of the weakest query; compactness is of all."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, options: HiCLROptions) -> None:
        super().__init__(encoder, projector, options)
        self._temperature = options.temperature

    def forward(self, sample: Sample) -> Output:
        *weak_to_strong, last = sample.views[0]
        k_MD, key_feature_MF = self._keys_and_features(last)
        features = [self.encoder(view) for view in weak_to_strong]  # one by one: batch norm may be split
        q_LND = torch.stack([self._query(feature_NF) for feature_NF in features])
        own = own_rows(len(features[0]))
        with torch.autocast(q_LND.device.type, enabled=False):
            queue_KD, regularisers = self.queue.keys_KD, self._options.regularisers
            contrast, led, figures = hierarchical(q_LND, k_MD[own], queue_KD, self._temperature)
            made = regularised(
                contrast, regularisers, q_LND[0], k_MD[own], k_MD, queue_KD, pairs=[(q_ND, k_MD[own]) for q_ND in q_LND]
            )
            loss, terms = with_features(made, regularisers, features[:1], [key_feature_MF[own]])
        terms |= {"led": led.detach(), "queue_filled": self.queue.filled, **figures}
        return Output(loss + led, terms, (k_MD,), features[0].detach())
