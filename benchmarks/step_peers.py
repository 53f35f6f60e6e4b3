"""The training loop of MoCo as its users run it: after the published builder and main loop (arXiv 1911.05722).

Kept as they are there: an EMA with temporaries parameter by parameter, the queue as columns (D, K) that is cloned every
step, N×(K+1) logits made by two einsums and a concatenation, a pointer and a loss that the host reads every step,
accuracies from a top-5 of the logits, the key batch shuffled and unshuffled, SGD as torch has it, and cuDNN left to
choose its fastest convolutions. On one process there is nobody to gather images from, so shuffling is all that is left
of it. One image gives one query and one key. On a GPU "fp32" convolves in TF32, which is cuDNN's default there.
"""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.repeated import times
from fasttrain.engine.precision import DTYPES, fastest_precision


@dataclass(frozen=True)
class Recipe:
    """What both sides of a comparison share."""

    dim: int
    queue_size: int
    ema: float
    temperature: float
    lr: float
    weight_decay: float


class MoCoLoop:
    """One step is `step(query_view, key_view)`, in the precision and the memory format that are asked for."""

    def __init__(
        self, network: nn.Module, recipe: Recipe, device: torch.device, amp: bool, channels_last: bool
    ) -> None:
        """network: (N, 3, S, S) → (N, D), encoder and head; taken over, not copied."""
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._query = network.to(device, memory_format=self._format)  # type: ignore[call-overload]
        self._key = copy.deepcopy(network)
        for parameter in self._key.parameters():
            parameter.requires_grad = False
        self._queue_DK = F.normalize(torch.randn(recipe.dim, recipe.queue_size, device=device), dim=0)
        self._pointer = torch.zeros(1, dtype=torch.long)
        self._recipe, self._device, self._dtype = recipe, device, torch.float32
        if amp:  # fp16 with a loss scale on a GPU, as their users run it; a CPU in what it multiplies in
            self._dtype = torch.float16 if device.type == "cuda" else DTYPES[fastest_precision(device)]
        torch.backends.cudnn.benchmark = True
        self._optimizer = torch.optim.SGD(
            network.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=amp and device.type == "cuda")
        self._criterion = nn.CrossEntropyLoss()

    def set_queue(self, keys_KD: Tensor) -> None:
        """Begin with other keys than random ones: rows of length 1."""
        self._queue_DK.copy_(keys_KD.T)

    def set_learning_rate(self, lr: float) -> None:
        """Of the steps from now on."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def step(self, query_view: Tensor, key_view: Tensor) -> float:
        """Views (N, 3, S, S) on the device, in any format → the loss."""
        query_view, key_view = (v.contiguous(memory_format=self._format) for v in (query_view, key_view))
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits, labels = self._forward(query_view, key_view)
            loss = self._criterion(logits, labels)
        _accuracy(logits, labels)
        value = loss.item()
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return value

    def _forward(self, query_view: Tensor, key_view: Tensor) -> tuple[Tensor, Tensor]:
        q_ND = F.normalize(self._query(query_view), dim=1)
        with torch.no_grad():
            self._move_key_encoder()
            shuffle_N = torch.randperm(len(key_view), device=self._device)
            k_ND = F.normalize(self._key(key_view[shuffle_N]), dim=1)[torch.argsort(shuffle_N)]
        positive_N1 = torch.einsum("nc,nc->n", [q_ND, k_ND]).unsqueeze(-1)
        negative_NK = torch.einsum("nc,ck->nk", [q_ND, self._queue_DK.clone().detach()])
        logits = torch.cat([positive_N1, negative_NK], dim=1)
        logits /= self._recipe.temperature
        self._enqueue(k_ND)
        return logits, torch.zeros(logits.shape[0], dtype=torch.long, device=self._device)

    def _move_key_encoder(self) -> None:
        momentum = self._recipe.ema
        for query, key in zip(self._query.parameters(), self._key.parameters(), strict=True):
            key.data = key.data * momentum + query.data * (1.0 - momentum)

    def _enqueue(self, k_ND: Tensor) -> None:
        pointer = int(self._pointer)
        self._queue_DK[:, pointer : pointer + len(k_ND)] = k_ND.T
        self._pointer[0] = (pointer + len(k_ND)) % self._recipe.queue_size


@torch.no_grad()
def _accuracy(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Top-1 and top-5 in per cent."""
    _, best = logits.topk(5, 1)
    right = best == labels[:, None]
    return [right[:, :k].float().sum().mul(100 / len(labels)) for k in (1, 5)]


class _TwoViews:
    """Two crops of an image with jitter, gray and flip: MoCo v2's transform without its blur, as at 32 px."""

    def __init__(self, size: int) -> None:
        from torchvision import transforms as T

        self._transform = T.Compose(
            [
                T.RandomResizedCrop(size, scale=(0.2, 1.0)),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __call__(self, image: object) -> tuple[Tensor, Tensor]:
        return self._transform(image), self._transform(image)


def loaded_views(folder: pathlib.Path, size: int, batch_size: int, workers: int, device: torch.device) -> Iterator:
    """Pairs of views of an image folder for ever, by torchvision and a DataLoader, as MoCo's own code makes them."""
    from torch.utils.data import ConcatDataset
    from torchvision.datasets import ImageFolder

    images = ImageFolder(str(folder), _TwoViews(size))
    repeated: ConcatDataset = ConcatDataset([images] * times(len(images), batch_size))
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        repeated, batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True,
        pin_memory=device.type == "cuda", multiprocessing_context="spawn",
    )  # fmt: skip
    while True:
        for (query_view, key_view), _ in loader:
            yield query_view.to(device, non_blocking=True), key_view.to(device, non_blocking=True)
