"""A method of your own from the parts: MoCo, and a pull to what the queue holds near the key.

python examples/own_method_losses.py --data shards

`readout` is the one pass over the queue: each row's log-sum-exp of its similarities, and its softmax average of the
queue, without a matrix of them all. InfoNCE needs the first, and the pull the second.
"""

from __future__ import annotations

import argparse

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from fasttrain import ViewLoader, readout
from fasttrain.networks.momentum import ema_update, momentum_copy
from fasttrain.networks.queue import Queue


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """A query has to find its key among the queue's (MoCo, arXiv 1911.05722, eq. 1)."""
    lse, _ = readout(q, queue, temperature)
    return F.softplus(lse - (q * k).sum(1) / temperature).mean()


def pull(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.05) -> Tensor:
    """How far a query is from the mean of its key's neighbours in the queue."""
    _, near = readout(k, queue, temperature)
    return (1 - (q * F.normalize(near, dim=1)).sum(1)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="converted data set, or a folder of images")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--queue-size", type=int, default=65536)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--max-steps", type=int, default=0, help="stop early")
    options = parser.parse_args()

    torch.manual_seed(0)
    loader = ViewLoader(options.data, views="mocov2", size=options.size, batch_size=options.batch_size)
    network = torchvision.models.resnet18(num_classes=128).to(loader.device, memory_format=torch.channels_last)
    key_network, queue = momentum_copy(network), Queue(options.queue_size, 128).to(loader.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    step = 0
    for epoch in range(options.epochs):
        for (x, y), _labels, _index in loader:
            q = F.normalize(network(x), dim=1)
            with torch.no_grad():
                k = F.normalize(key_network(y), dim=1)
            contrast, near = info_nce(q, k, queue.keys_KD), pull(q, k, queue.keys_KD)
            optimizer.zero_grad()
            (contrast + 0.5 * near).backward()
            optimizer.step()
            ema_update(key_network, network, momentum=0.999)
            queue.enqueue(k)
            step += 1
            if step % 10 == 0 or step == options.max_steps:
                print(f"epoch {epoch} step {step} contrast {contrast.item():.4f} pull {near.item():.4f}", flush=True)
            if step == options.max_steps:
                return


if __name__ == "__main__":
    main()
