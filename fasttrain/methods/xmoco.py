"""XMoCo (arXiv 2206.04676): MoCo with cross-similarity consistency and uniform-similarity regularisation.

L = L_InfoNCE + λ_x · L_cross + λ_u · L_uniform, each regulariser read over the batch or over the queue; the equations
are in docs/objective.md. Under data parallelism "batch" is the global batch.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fasttrain.dist import gather_rows_with_gradient, world_size
from fasttrain.methods.moco import MoCo
from kernels import similarity


class XMoCo(MoCo):
    """MoCo plus the two regularisers."""

    def loss(self, q_ND: Tensor, k_ND: Tensor, k_MD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total, _ = super().loss(q_ND, k_ND, k_MD)
        terms = {"info_nce": total}
        config = self.config
        if config.cross != "none":
            terms["cross"] = self._cross(q_ND, k_ND, k_MD)
            total = total + config.cross_weight * terms["cross"]
        if config.uniform != "none":
            terms["uniform"] = self._uniform(q_ND, k_MD)
            total = total + config.uniform_weight * terms["uniform"]
        return total, {name: term.detach() for name, term in terms.items()}

    def _cross(self, q_ND: Tensor, k_ND: Tensor, k_MD: Tensor) -> Tensor:
        if self.config.cross == "batch":
            return similarity.batch_consistency(gather_rows_with_gradient(q_ND), k_MD)
        return similarity.queue_consistency(q_ND, k_ND, self.queue.keys_KD, self.config.cross_temperature)

    def _uniform(self, q_ND: Tensor, k_MD: Tensor) -> Tensor:
        if self.config.uniform == "batch":
            first = dist.get_rank() * len(q_ND) if world_size() > 1 else 0
            return similarity.batch_uniformity(q_ND, k_MD, first, self.config.uniform_temperature)
        return similarity.queue_uniformity(q_ND, self.queue.keys_KD, self.config.uniform_temperature)
