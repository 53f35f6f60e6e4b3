#!/usr/bin/env python3
"""Pre-train an image encoder.

    python fasttrain/train.py --data OUT --method xmoco
    torchrun --nproc-per-node 8 fasttrain/train.py --data OUT --method xmoco

The file reads top to bottom: set up, the loop, the end. One step is on one screen.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from types import FrameType

if __package__ in (None, ""):  # run as a script from a bare checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import torch

from fasttrain import run_folder
from fasttrain.checkpoint import save_checkpoint
from fasttrain.cli import UserError, finish
from fasttrain.config import TrainConfig, as_dict, differences, parse_config
from fasttrain.data import Loader, Order, Store, open_dataset, open_loader, pixel_statistics
from fasttrain.dist import Ranks, data_parallel
from fasttrain.faults import explained
from fasttrain.log import SilentLog, TrainLog
from fasttrain.methods import channels_last, make_method
from fasttrain.optim import learning_rate, make_optimizer, set_learning_rate
from fasttrain.report import write_report
from fasttrain.samples import write_samples
from fasttrain.views import RECIPES, draw
from kernels.augment import IMPLEMENTATIONS as AUGMENT_IMPLEMENTATIONS
from kernels.augment import augment


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1 until the step is finished; a second SIGINT ends the process at once.

    Launchers repeat the other two (a scheduler signals torchrun, torchrun its processes), so those only count once.
    """

    received = 0

    def __init__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if self.received:
            return
        self.received = number
        if os.environ.get("RANK", "0") == "0":  # not print: the signal may have come in the middle of one
            os.write(2, b"stopping after this step, with a checkpoint\n")


def make_loader(store: Store, config: TrainConfig, ranks: Ranks) -> Loader:
    """The samples in their seeded order. Raises UserError for a batch that can't be."""
    if config.batch_size > store.num_samples:
        raise UserError(f"--batch-size {config.batch_size} is larger than the data set ({store.num_samples} images)")
    if config.batch_size % ranks.world_size or config.batch_size // ranks.world_size < 2:
        raise UserError(
            f"--batch-size {config.batch_size} must be a multiple of the {ranks.world_size} process(es), 2 or more each"
        )
    order = Order(store.num_samples, config.batch_size, config.seed, True, ranks.rank, ranks.world_size)
    # Whole images go to the device only where a kernel there makes views of them.
    device = ranks.device if "triton" in AUGMENT_IMPLEMENTATIONS else None
    return open_loader(store, order, config.workers or ranks.cores, config.loader, device, config.max_failed_fraction)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make everything torch draws in a step a function of (seed, step, rank), so there is no random state to save."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


@explained
def train(config: TrainConfig) -> int:
    """Train to the end of the schedule, --max-steps or a signal; returns the exit status."""
    stop = StopSignal()
    ranks = Ranks(config.device)
    method = channels_last(make_method(config), ranks.device)
    optimizer = make_optimizer(method, config.lr, config.weight_decay)
    store = open_dataset(pathlib.Path(config.data), "train", config.loader, config.size)
    loader = make_loader(store, config, ranks)
    mean, std = pixel_statistics(pathlib.Path(config.data), config.loader)

    run = pathlib.Path(str(ranks.share(str(run_folder.run_path(config)))))
    claim = run_folder.prepare(run, config) if ranks.is_main else None
    ranks.wait()
    step = 0
    if state := run_folder.newest_state(run):
        if changed := differences(state["config"], config):
            raise UserError(f"the newest checkpoint of {run} has other settings: {'; '.join(changed)}")
        if state["data"] != store.fingerprint:
            raise UserError(f"{run} was begun with other images, or in another order, than those of {config.data}")
        step = state["step"]
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        if ranks.is_main:
            print(f"continuing {run} from step {step}", file=sys.stderr, flush=True)
    steps_per_epoch = loader.steps_per_epoch
    schedule = config.epochs * steps_per_epoch, int(config.warmup_epochs * steps_per_epoch), config.lr
    last_step = min(schedule[0], config.max_steps or schedule[0])
    model = data_parallel(method)
    log = (
        TrainLog(run, step, last_step, config.log_every, config.batch_size, config.tensorboard)
        if ranks.is_main
        else SilentLog()
    )

    def save() -> None:
        log.flush(step, epoch, lr)  # a loss that is not finite stops the run here, before it is saved
        if ranks.is_main:
            state = {
                "step": step,
                "config": as_dict(config),
                "data": store.fingerprint,
                "method": method.state_dict(),
                "optimizer": optimizer.state_dict(),
                "loader": loader.state_dict(),
            }
            save_checkpoint(run / "checkpoints", state, config.keep_last)

    saved, stopped, epoch, lr = step, 0, step // steps_per_epoch, 0.0
    host_views: torch.Tensor | None = None  # one buffer for all steps
    try:
        while step < last_step and not stopped:
            epoch = step // steps_per_epoch
            for batch in log.timed(loader.epoch(epoch)):
                table = draw(RECIPES[config.recipe], batch.height_B, batch.width_B, batch.index_B, config.seed, epoch)
                host_views = augment(
                    batch.pixels, batch.offset_B, batch.height_B, batch.width_B, table, config.size, mean, std,
                    out=host_views,
                )  # fmt: skip
                views = host_views.to(ranks.device)
                if ranks.is_main and step == 0:
                    write_samples(run / "samples.png", batch, views, mean, std)
                seed_step(config.seed, step, ranks.rank)
                with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    loss, terms = model(views)
                loss.backward()
                lr = learning_rate(step, *schedule)
                set_learning_rate(optimizer, lr)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                method.after_step()
                step += 1

                log.step(step, epoch, lr, ranks.mean(terms))
                stopped = ranks.agree(stop.received)
                if stopped or step == last_step or step % config.checkpoint_every == 0:
                    save()
                    saved = step
                if stopped or step == last_step:
                    break
    finally:
        loader.close()
        log.close()
        if claim:
            claim.close()
    if ranks.is_main:
        write_report(run)
        done = f"stopped by {signal.Signals(stopped).name}" if stopped else "done"
        print(f"{done} at step {saved}; {run / 'report.html'}", file=sys.stderr, flush=True)
    ranks.close()
    return 128 + stopped if stopped else 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: train(parse_config(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    raise SystemExit(main())
