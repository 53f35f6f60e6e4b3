#!/usr/bin/env python3
"""Pre-train an image encoder.

    python fasttrain/train.py --data OUT --method xmoco
    torchrun --nproc-per-node 8 fasttrain/train.py --data OUT --method xmoco

The file reads top to bottom: set up, the loop, the end. One step is on one screen.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
from types import FrameType

if __package__ in (None, ""):  # run as a script from a bare checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import torch

from fasttrain.config import TrainConfig, as_dict, parse_config
from fasttrain.engine.optim import learning_rate
from fasttrain.engine.ranks import Ranks
from fasttrain.engine.skips import Skips
from fasttrain.engine.step import TrainStep, compile_networks
from fasttrain.evaluation.monitor import Evaluations, KnnMonitor
from fasttrain.input import Loader, Order, Store, open_dataset, open_loader, pixel_statistics
from fasttrain.kernels.augment import augment
from fasttrain.methods import AUTOCAST, Method, channels_last, make_method
from fasttrain.networks.encoders import feature_width
from fasttrain.networks.recompute import checkpoint_activations
from fasttrain.report import write_report
from fasttrain.run.checkpoint import save_checkpoint, saved_checkpoints
from fasttrain.run.faults import explained
from fasttrain.run.folder import prepare, run_path
from fasttrain.run.log import SilentLog, TrainLog
from fasttrain.run.resume import resume
from fasttrain.run.samples import write_samples
from fasttrain.system.cli import finish
from fasttrain.system.collectives import common_generator
from fasttrain.system.errors import RunError, UserError
from fasttrain.views.draw import draw
from fasttrain.views.spec import RECIPES

GROWING = 0.75  # part of the epochs in which views grow to their final size
NAMED = 8  # samples in an error line


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
    parts = ranks.world_size * config.accumulate
    if config.batch_size % ranks.world_size or config.batch_size // ranks.world_size < 2:
        raise UserError(
            f"--batch-size {config.batch_size} must be a multiple of the {ranks.world_size} process(es), 2 or more each"
        )
    if config.batch_size // ranks.world_size % config.accumulate or config.batch_size < 2 * parts:
        raise UserError(
            f"--batch-size {config.batch_size} can't be cut into {parts} equal parts (--accumulate) of 2 or more"
        )
    order = Order(store.num_samples, config.batch_size, config.seed, True, ranks.rank, ranks.world_size)
    return open_loader(
        store, order, ranks.threads(config.workers), config.loader, ranks.device, config.max_failed_fraction
    )


def make_networks(config: TrainConfig, device: torch.device) -> Method:
    """The method on its device, its networks as the options have them run. Raises UserError for what can't be."""
    method = make_method(config)
    if config.resolution:
        feature_width(method.encoder, config.arch, config.start_size)
    if config.checkpoint_activations:
        checkpoint_activations(method.encoder)
    compile_networks(method, config, device)
    return channels_last(method, device)


def view_size(epoch: int, config: TrainConfig) -> int:
    """Side of an epoch's views: from the first of --resolution linearly to --size, reached after GROWING of the epochs.

    In steps of an encoder's total stride, so that no size wastes pixels.
    """
    stride = 32 if config.size > 64 else 8
    progress = min(1.0, epoch / (GROWING * config.epochs))
    missing = (config.size - config.start_size) * (1 - progress)
    return max(config.start_size, config.size - round(missing / stride) * stride)


def not_finite(run: pathlib.Path, config: TrainConfig, num_samples: int, skips: Skips, step: int) -> RunError:
    """The error of too many skipped steps. The last one's samples are written to RUN/not-finite.json."""
    order = Order(num_samples, config.batch_size, config.seed)
    epoch, place = divmod(skips.last, order.steps_per_epoch)
    samples = order.step(order.epoch(epoch), place).tolist()
    record = run / "not-finite.json"
    record.write_text(json.dumps({"step": skips.last + 1, "epoch": epoch, "samples": samples}) + "\n")
    good = next(iter(saved_checkpoints(run / "checkpoints")), "none yet")
    named = ", ".join(map(str, samples[:NAMED])) + (f", … (all in {record})" if len(samples) > NAMED else "")
    return RunError(
        f"the loss or its gradients were not finite in {skips.total} of {step} steps, {skips.in_a_row} in a row, the "
        f"last at step {skips.last + 1} with samples {named}; the last good checkpoint: {good}; lower --lr, or try "
        "--precision fp32"
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make everything drawn in a step a function of (seed, step, rank), or (seed, step) for what ranks draw alike, so
    there is no random state to save."""
    common = seed * 1_000_003 + step
    common_generator.manual_seed(common % 2**63)
    torch.manual_seed((common * 65_537 + rank) % 2**63)


@explained
def train(config: TrainConfig) -> int:
    """Train to the end of the schedule, --max-steps or a signal; returns the exit status."""
    stop = StopSignal()
    ranks = Ranks(config.device)
    method = make_networks(config, ranks.device)
    update = TrainStep(method, config, ranks)
    store = open_dataset(pathlib.Path(config.data), "train", config.loader, config.size)
    loader = make_loader(store, config, ranks)
    mean, std = pixel_statistics(pathlib.Path(config.data), config.loader)
    workers = ranks.threads(config.workers)
    knn = KnnMonitor(config, ranks.device, workers) if config.knn_every else None

    run = pathlib.Path(ranks.share(str(run_path(config))))
    claim = ranks.together(lambda: prepare(run, config) if ranks.is_main else None)

    def restore(state: dict) -> None:
        method.load_state_dict(state["method"])
        update.load_state_dict(state)
        loader.load_state_dict(state["loader"])

    step = resume(run / "checkpoints", config, store.fingerprint, ranks, restore)
    steps_per_epoch = loader.steps_per_epoch
    schedule = config.epochs * steps_per_epoch, int(config.warmup_epochs * steps_per_epoch), config.lr
    last_step = min(schedule[0], config.max_steps or schedule[0])
    log: TrainLog = SilentLog()
    if ranks.is_main:
        log = TrainLog(
            run, step, last_step, config.log_every, config.batch_size, config.tensorboard, ranks.device, workers
        )
    evaluations = Evaluations(knn, config.knn_every * steps_per_epoch, run, ranks, lambda: stop.received)

    def save(at_any_rate: bool) -> None:
        """Write a checkpoint; unless at any rate, not while steps are being skipped: it might push out good ones."""
        log.flush(step, epoch, lr)
        if log.skips.too_many(step):
            raise not_finite(run, config, store.num_samples, log.skips, step)
        if ranks.is_main and (at_any_rate or not log.skips.in_a_row):
            state = {
                "step": step, "config": as_dict(config), "data": store.fingerprint, "method": method.state_dict(),
                **update.state_dict(), "loader": loader.state_dict(),
            }  # fmt: skip
            save_checkpoint(run / "checkpoints", state, config.keep_last)

    stopped, epoch, lr = 0, max(0, step - 1) // steps_per_epoch, 0.0
    views: torch.Tensor | None = None  # one buffer for all steps
    views_dtype = AUTOCAST.get(config.precision, torch.float32)
    try:
        if evaluations.due(step):  # may not have been done when this checkpoint was written
            stopped = evaluations(method, step, epoch, log)
        while step < last_step and not stopped:
            epoch = step // steps_per_epoch
            size = view_size(epoch, config)
            if views is not None and views.shape[-1] != size:
                views = None
            for batch in log.timed(loader.epoch(epoch)):
                with log.making_views():
                    sizes = batch.height_B, batch.width_B
                    table = draw(RECIPES[config.recipe], *sizes, batch.index_B, config.seed, epoch)
                    views = augment(
                        batch.pixels, batch.offset_B, *sizes, table, size, mean, std, dtype=views_dtype, out=views
                    )
                if ranks.is_main and step == 0:
                    write_samples(run / "samples.png", batch, views, mean, std)
                seed_step(config.seed, step, ranks.rank)
                lr = learning_rate(step, *schedule)
                terms = update(views, step, lr)
                step += 1

                log.step(step, epoch, lr, ranks.mean(terms), update.skips_3)
                if log.skips.too_many(step):
                    raise not_finite(run, config, store.num_samples, log.skips, step)
                stopped = ranks.agree(stop.received)
                due, ends = evaluations.due(step), bool(stopped) or step == last_step
                if ends or due or step % config.checkpoint_every == 0:
                    save(at_any_rate=ends or due)
                if due and not stopped:
                    stopped = evaluations(method, step, epoch, log)
                if stopped or ends:
                    break
    finally:
        loader.close()
        log.close()
        if claim:
            claim.close()
    if ranks.is_main:
        write_report(run)
        done = f"stopped by {signal.Signals(stopped).name}" if stopped else "done"
        print(f"{done} at step {step}; {run / 'report.html'}", file=sys.stderr, flush=True)
    ranks.close()
    return 128 + stopped if stopped else 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: train(parse_config(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    raise SystemExit(main())
