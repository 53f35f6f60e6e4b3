"""SimCLR in a plain PyTorch loop, fed by ViewLoader: it can be stopped at any step, and goes on there.

python examples/plain_loop.py --data shards --checkpoint simclr.pt
"""

from __future__ import annotations

import argparse
import pathlib

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from fasttrain import ViewLoader


def nt_xent(x: Tensor, y: Tensor, temperature: float = 0.2) -> Tensor:
    """Each view has to find the other view of its image among all views of the batch (arXiv 2002.05709, eq. 1)."""
    z = F.normalize(torch.cat([x, y]), dim=1)
    similarities = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarities, torch.arange(len(z), device=z.device).roll(len(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="converted data set, or a folder of images")
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, default="simclr.pt", help="read at the start, if it is there"
    )
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--max-steps", type=int, default=0, help="stop early")
    options = parser.parse_args()

    torch.manual_seed(0)
    loader = ViewLoader(options.data, views="simclr", size=options.size, batch_size=options.batch_size)
    # views are channels-last: so should the weights be
    network = torchvision.models.resnet18(num_classes=128).to(loader.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    step = 0
    if options.checkpoint.exists():
        state = torch.load(options.checkpoint, map_location=loader.device)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        step = state["step"]

    for epoch in range(loader.epoch, options.epochs):  # the first one may begin in its middle
        for (x, y), _labels, _index in loader:
            with torch.autocast(loader.device.type, torch.bfloat16, enabled=loader.device.type == "cuda"):
                out = network(x), network(y)
            loss = nt_xent(out[0].float(), out[1].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 10 == 0 or step == options.max_steps:
                print(f"epoch {epoch} step {step} loss {loss.item():.4f}", flush=True)
            if step == options.max_steps:
                break
        # here, or at any step inside the loop: the loader's state is that behind the batch it handed out last
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
        torch.save({**state, "step": step}, options.checkpoint)
        if step == options.max_steps:
            break
    loader.close()


if __name__ == "__main__":
    main()
