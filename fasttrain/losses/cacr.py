"""Contrastive attraction and contrastive repulsion (CACR; Zheng et al., arXiv 2105.03746), over a batch or a queue.

    L = mean Σ_p a_p d_p − mean Σ_j b_j d_j,  d = ‖u − v‖²,  a = softmax_p(t⁺ d_p),  b = softmax_j(−t⁻ d_j)

Positives weigh more the further away they are, negatives the nearer they are. Rows L2-normalised. Scalars, fp32 (fp64
for fp64).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from fasttrain.losses import reference
from fasttrain.losses.multi_view import gather_views
from fasttrain.losses.queue import QueueRead, QueueTerm, Side, dot
from fasttrain.system.collectives import first_row


def cacr(z_VND: Tensor, sharpness: float, negative_sharpness: float) -> tuple[Tensor, Tensor]:
    """Attraction and repulsion of V ≥ 2 views, over the images of all ranks; their sum is the loss. Weights and all
    rows take gradient, as in the paper's code for it.

    z_VND (V, N, D): this rank's rows, z_VND[:, i] those of one image; the same N on every rank, at least 2 over all.
    Attraction is a mean over the views, of each to the others; repulsion over the pairs of views, of the first one's
    rows from the other images' in the second. The mean over the ranks is that of one process that holds all rows. Forms
    N×M for a pair of views, M rows being of all ranks: weights that take a gradient are more than `readout` gives.
    """
    z_VMD, views, first = gather_views(z_VND), range(len(z_VND)), first_row(z_VND.shape[1])
    near = [reference.attraction(z_VND[v], torch.stack([z_VND[w] for w in views if w != v]), sharpness) for v in views]
    apart = [reference.repulsion(z_VND[v], z_VMD[w], first, negative_sharpness) for v, w in combinations(views, 2)]
    return torch.stack(near).mean(), torch.stack(apart).mean()


@dataclass(frozen=True, eq=False)
class QueueCACR(QueueTerm):
    """Attraction to the P keys of an image's other views, repulsion from the queue. Weights take no gradient.

    temperature: 1/(2t⁻), as b = softmax_j(2t⁻ q·Q_j). positive_PND: (P, N, D); the key of `value` is not used.
    """

    positive_PND: Tensor
    sharpness: float

    def value(self, q_ND: Tensor, k_ND: Tensor, read: QueueRead) -> Tensor:
        # d = 2 − 2u·v, whose constants cancel, as the weights of both sums are 1 in all
        near_PN = (q_ND * self.positive_PND).sum(2)
        a_PN = (-2 * self.sharpness * near_PN).softmax(0).detach()
        return 2 * (dot(q_ND, read[Side("q", self.temperature)].out_ND) - (a_PN * near_PN).sum(0)).mean()

    def reference(self, q_ND: Tensor, k_ND: Tensor, queue_KD: Tensor) -> Tensor:
        return reference.queue_cacr(q_ND, self.positive_PND, queue_KD, self.sharpness, 0.5 / self.temperature)
