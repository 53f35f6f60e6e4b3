"""XMoCo (arXiv 2206.04676): MoCo with cross-similarity consistency and uniform-similarity regularisation.

L = L_InfoNCE + λ_x · L_cross + λ_u · L_uniform, each regulariser read over the batch or over the queue; the equations
are in docs/objective.md. Under data parallelism "batch" is the global batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fasttrain.kernels import similarity
from fasttrain.kernels.similarity import Gram
from fasttrain.methods.moco import MoCo
from fasttrain.system.collectives import sum_over_ranks, world_size


class XMoCo(MoCo):
    """MoCo plus the two regularisers."""

    def loss(self, q_ND: Tensor, k_ND: Tensor, k_MD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        over_queue = similarity.queue_terms(
            q_ND, k_ND, self.queue.keys_KD, config.temperature,
            consistency_temperature=config.cross_temperature if config.cross == "queue" else None,
            uniformity_temperature=config.uniform_temperature if config.uniform == "queue" else None,
            decoupled=config.decoupled,
        )  # fmt: skip
        cross, uniform = over_queue.consistency, over_queue.uniformity
        if config.cross == "batch":
            sums = Gram(*sum_over_ranks(torch.stack(similarity.gram(q_ND, k_ND))))
            cross = similarity.gram_consistency(sums, len(k_MD)).float()
        if config.uniform == "batch":
            first = dist.get_rank() * len(q_ND) if world_size() > 1 else 0
            uniform = similarity.batch_uniformity(
                q_ND, k_MD.to(self.queue.keys_KD.dtype), first, config.uniform_temperature
            )

        total, terms = over_queue.contrast, {"info_nce": over_queue.contrast}
        if cross is not None:
            total, terms["cross"] = total + config.cross_weight * cross, cross
        if uniform is not None:
            total, terms["uniform"] = total + config.uniform_weight * uniform, uniform
        return total, {name: term.detach() for name, term in terms.items()}
