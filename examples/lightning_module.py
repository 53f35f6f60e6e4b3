"""ViewLoader in a Lightning module. Lightning keeps the loader's position in its checkpoints, so it goes on exactly.

python examples/lightning_module.py --data shards --folder runs/lightning
python examples/lightning_module.py --data shards --folder runs/lightning --resume
"""

from __future__ import annotations

import argparse
import pathlib

import lightning
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from fasttrain import ViewLoader
from fasttrain.losses.contrast import nt_xent
from fasttrain.view_loader import ViewBatch


class SimCLR(lightning.LightningModule):
    def __init__(self, data: str, size: int, batch_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = torchvision.models.resnet18(num_classes=128).to(memory_format=torch.channels_last)

    def train_dataloader(self) -> ViewLoader:
        # Made here, where Lightning has started its processes: each takes its share of every batch. Views are made on
        # this process's device, where Lightning wants them, and no sampler is needed.
        options = self.hparams
        return ViewLoader(options["data"], views="simclr", size=options["size"], batch_size=options["batch_size"])

    def training_step(self, batch: ViewBatch, _step: int) -> Tensor:
        x, y = batch.views
        a, b = (F.normalize(self.network(view).float(), dim=1) for view in (x, y))
        loss = nt_xent(a, b, temperature=0.2)  # over the batch of all processes
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="converted data set, or a folder of images")
    parser.add_argument("--folder", type=pathlib.Path, default="runs/lightning", help="takes the checkpoint, last.ckpt")
    parser.add_argument("--resume", action="store_true", help="go on from it")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early")
    options = parser.parse_args()

    lightning.seed_everything(0)
    module = SimCLR(options.data, options.size, options.batch_size)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        max_steps=options.max_steps,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    checkpoint = options.folder / "last.ckpt"
    trainer.fit(module, ckpt_path=checkpoint if options.resume else None)
    trainer.save_checkpoint(checkpoint)


if __name__ == "__main__":
    main()
