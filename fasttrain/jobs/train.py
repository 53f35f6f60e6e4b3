"""Pre-train an image encoder.

The file reads top to bottom: set up, the loop, the end. One step is on one screen.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import threading
from dataclasses import replace
from typing import NamedTuple

import torch
from rich.console import Console

from fasttrain.config import TrainConfig
from fasttrain.engine.networks import AUTOCAST, initialise, is_compiled, make_networks
from fasttrain.engine.optim import Schedule
from fasttrain.engine.options import BASE_BATCH
from fasttrain.engine.probe import OnlineProbe
from fasttrain.engine.ranks import Ranks, given_back
from fasttrain.engine.skips import Skips
from fasttrain.engine.step import TrainStep
from fasttrain.engine.views import make_views, on_device
from fasttrain.evaluation.health import HealthMonitor
from fasttrain.evaluation.health_events import COLLAPSED, HealthEvents, Plan, plan
from fasttrain.evaluation.monitor import Evaluations, KnnMonitor
from fasttrain.input import (
    FolderStore,
    Loader,
    Order,
    Store,
    open_dataset,
    open_loader,
    pixel_statistics,
    seems_labelled,
)
from fasttrain.jobs.init import initial_weights_of_all
from fasttrain.jobs.report import write_report
from fasttrain.kernels.augment import Views
from fasttrain.methods import Method, Progress, Sample
from fasttrain.networks.batch_norm import has_batch_norm, is_split
from fasttrain.networks.groups import MAX_SHARE, Groups, check_groups, check_rows
from fasttrain.run.checkpoint import save_checkpoint, saved_checkpoints
from fasttrain.run.display import Display
from fasttrain.run.ending import begin_again, keep_ending
from fasttrain.run.extension import check_extension, keep_extension
from fasttrain.run.folder import DataRecord, check_outside, keep_data, keep_init, keep_steps, prepare, run_path
from fasttrain.run.health import Health
from fasttrain.run.metrics import Metrics, Sink
from fasttrain.run.resume import goes_on, resume
from fasttrain.run.samples import write_samples
from fasttrain.run.sinks import check_services, open_sinks
from fasttrain.run.starts import keep_start
from fasttrain.system.collectives import common_generator
from fasttrain.system.durable import write_json
from fasttrain.system.errors import RunError, UserError, printable
from fasttrain.system.lock import Lock
from fasttrain.system.options import Settings
from fasttrain.system.signals import StopSignal
from fasttrain.views.spec import sides

NAMED = 8  # samples in an error line
_alone = threading.Lock()  # held while this process trains: what is drawn comes from torch's one random state


class Finished(NamedTuple):
    """How a training has ended. run: its folder. step: the last that is done. stopped: the number of the signal that
    ended it, 0 for none."""

    run: pathlib.Path
    step: int
    stopped: int


def make_loader(store: Store, config: TrainConfig, ranks: Ranks) -> Loader:
    """The samples in their seeded order. Raises UserError for a batch that can't be and for missing labels."""
    batch_size, accumulate = config.optimisation.batch_size, config.optimisation.accumulate
    if batch_size > store.num_samples:
        raise UserError(f"--batch-size {batch_size} is larger than the data set ({store.num_samples} images)")
    parts = ranks.world_size * accumulate
    if batch_size % ranks.world_size or batch_size // ranks.world_size < 2:
        raise UserError(
            f"--batch-size {batch_size} must be a multiple of the {ranks.world_size} process(es), 2 or more each"
        )
    if batch_size // ranks.world_size % accumulate or batch_size < 2 * parts:
        raise UserError(f"--batch-size {batch_size} can't be cut into {parts} equal parts (--accumulate) of 2 or more")
    needs, probes = config.method.needs_labels, config.logging.online_probe
    if (needs or probes) and not (store.classes and seems_labelled(store)):
        whose = f"--method {config.run.method}" if needs else "--online-probe"
        raise UserError(f"{whose} needs labels, and {config.data.data} has images without")
    order = Order(store.num_samples, batch_size, config.run.seed, True, ranks.rank, ranks.world_size)
    workers = ranks.threads(config.machine.workers)
    return open_loader(
        store, order, workers, config.data.loader, ranks.device, config.data.max_failed_fraction,
        labels=needs or probes,
    )  # fmt: skip


def make_groups(config: TrainConfig, method: Method, ranks: Ranks) -> Groups | None:
    """How batch norm cuts each micro-batch; None: not at all. Raises UserError where a query could tell its key by the
    cut, and where a head has too few rows."""
    optimisation, kind, number = config.optimisation, config.encoder.batch_norm, config.encoder.batch_norm_groups
    cut = optimisation.batch_size, ranks.world_size, optimisation.accumulate
    if any(has_batch_norm(network) for name, network in method.named_children() if "encoder" not in name):
        check_rows(*cut, kind, number)
    return check_groups(*cut, number) if is_split(method.encoder) else None


def plan_health(config: TrainConfig, loader: Loader, ranks: Ranks) -> tuple[Plan, HealthMonitor | None]:
    """When the representation is looked at, and what looks at it, None: nothing. Raises UserError for what is asked of
    it and can't be, DataError."""
    logging, batch_size = config.logging, config.optimisation.batch_size
    recipe, steps = config.views.recipe_for(config.method.views), config.optimisation.epochs * loader.steps_per_epoch
    needs = logging.online_probe or logging.lidar or logging.stop_on_collapse
    found = plan(logging.health_every, steps, batch_size, recipe, ranks.world_size, needs)
    if not found.every:
        return found, None
    monitor = HealthMonitor(
        config.data, recipe, config.views.size, config.run.seed, found.images, logging.lidar, ranks.device,
        ranks.threads(config.machine.workers),
    )  # fmt: skip
    if logging.online_probe and not monitor.is_labelled:
        raise UserError(f"--online-probe is measured on the val split, and {config.data.data} has none with labels")
    return found, monitor


def not_finite(run: pathlib.Path, store: Store, order: Order, skips: Skips, step: int) -> RunError:
    """The error of too many skipped steps. The last one's samples are written to RUN/not-finite.json."""
    epoch, place = divmod(skips.last, order.steps_per_epoch)
    samples = order.step(order.epoch(epoch), place).tolist()
    record = run / "not-finite.json"
    names = [store.name(sample) for sample in samples]
    write_json(record, {"step": skips.last + 1, "epoch": epoch, "samples": samples, "names": names})
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


def state_of(
    step: int, settings: Settings, data: DataRecord, method: Method, trainer: TrainStep, probe: OnlineProbe | None,
    loader: Loader,
) -> dict:  # fmt: skip
    """Everything that a run needs to go on from a step."""
    return {
        "step": step, "config": settings.values, "data": data.fingerprint, "mean": data.mean, "std": data.std,
        "method": method.state_dict(), **trainer.state_dict(), "loader": loader.state_dict(),
        **({"probe": probe.state_dict()} if probe else {}),
    }  # fmt: skip


def train(config: TrainConfig) -> Finished:
    """Train to the end of the schedule, --max-steps or a signal, which ends it after a step, with a checkpoint.

    What it changes in this process is as before when it returns or raises: signal handlers, the threads and cores that
    torch uses, torch's random state. config: of make_config. Raises UserError for what it can't be trained with,
    RunError, DataError or OSError for what goes wrong on the way, and KeyboardInterrupt for a second Ctrl-C.
    """
    if not isinstance(config, TrainConfig):
        raise UserError(f"train() takes a configuration, as make_config() returns it, not {config!r}")
    if not config.data.data:
        raise UserError("--data is missing: the images to train on")
    if not _alone.acquire(blocking=False):
        raise UserError("this process is training already: a second one, at the same time, takes another process")
    try:
        with StopSignal() as stop, given_back(), contextlib.ExitStack() as closing:
            return _train(config, stop, closing)
    finally:
        _alone.release()


def _train(config: TrainConfig, stop: StopSignal, closing: contextlib.ExitStack) -> Finished:
    """closing: takes all that has to be closed, whatever happens from here on."""
    # First, as it keeps this process, and all threads that it starts from now on, on its share of the cores.
    ranks = Ranks(config.machine.device)
    closing.enter_context(torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []))

    # What may be refused for its options or its data comes before the run folder is touched.
    method = make_networks(
        config.method, config.encoder, config.views, config.optimisation, config.machine, ranks.device, config.run.seed
    )
    trainer = TrainStep(method, config.optimisation, ranks.device, config.machine.cuda_graph)
    recipe = config.views.recipe_for(config.method.views)
    path = pathlib.Path(config.data.data)
    store = open_dataset(path, "train", config.data.loader, config.views.size, config.data.val_fraction)
    loader = make_loader(store, config, ranks)
    closing.callback(loader.close)
    groups = make_groups(config, method, ranks)
    data = DataRecord(os.path.realpath(path), store.fingerprint, *pixel_statistics(path, config.data.loader))
    workers, logging = ranks.threads(config.machine.workers), config.logging
    knn = probe = None
    if logging.knn_every:
        knn = KnnMonitor(config.data, logging.knn_k, config.views.size, ranks.device, workers)
    if logging.online_probe:
        probe = OnlineProbe(len(store.classes), ranks.device)
    health_plan, monitor = plan_health(config, loader, ranks)

    # The first rank claims the folder; then all go on from the checkpoint that it chooses.
    settings = Settings.of(config)
    run = pathlib.Path(ranks.share(str(run_path(config.run))))
    init = None
    if config.encoder.init and not ranks.share(goes_on(run, config.run.fresh)):
        init = initial_weights_of_all(config, method.encoder, ranks)

    def begin() -> Lock:
        check_services(config.logging)
        if isinstance(store, FolderStore):
            check_outside(run, path)
        return prepare(run, settings, config.run.fresh)

    ranks.together(lambda: closing.enter_context(begin()) if ranks.is_main else None)
    step = stopped = 0
    if ranks.is_main:
        closing.push(lambda _kind, error, _trace: keep_ending(run, step, stopped, error))

    def restore(state: dict) -> None:
        nonlocal data  # whose statistics belong to the run, as its weights do
        check_extension(run, settings, state["step"], loader.steps_per_epoch)
        data = replace(data, mean=state.get("mean", data.mean), std=state.get("std", data.std))
        method.load_state_dict(state["method"])
        trainer.load_state_dict(state)
        loader.load_state_dict(state["loader"])
        if probe:
            probe.load_state_dict(state.get("probe", {}))

    step = resume(run / "checkpoints", settings, store.fingerprint, ranks, restore)
    if config.encoder.init and step == 0:
        init = init or initial_weights_of_all(config, method.encoder, ranks)
        initialise(method, init.weights)
        if ranks.is_main:
            print(printable(init.line), file=sys.stderr, flush=True)
    mean, std = data.mean, data.std

    # The schedule is a function of the step; --max-steps does not change it.
    optimisation, batch_size = config.optimisation, config.optimisation.batch_size
    steps_per_epoch = loader.steps_per_epoch
    schedule = Schedule(optimisation, steps_per_epoch, config.run.extend)
    last_step = min(schedule.total_steps, config.run.max_steps or schedule.total_steps)
    epoch, lr = max(0, step - 1) // steps_per_epoch, 0.0

    # Last, as they truncate metrics.jsonl to the step that was resumed, and take over the terminal.
    health = Health(ranks.device, workers)

    def record() -> tuple[Sink, ...]:
        keep_data(run, data)
        if init and step == 0:
            keep_init(run, init.record)
        keep_extension(run, settings, step)
        keep_start(run, step, ranks.world_size)
        keep_steps(run, last_step, steps_per_epoch)
        begin_again(run)
        return open_sinks(run, step, config.logging, settings.values)

    files = ranks.together(lambda: record() if ranks.is_main else ())
    display = Display(Console(stderr=True, quiet=not ranks.is_main), step, last_step, batch_size, health.hint)
    stop.tell = display.note
    metrics = Metrics((*files, display), health, ranks.device, config.logging.log_every, batch_size)
    closing.callback(metrics.close)
    display.say(f"learning rate {optimisation.peak_lr:g}: --lr {optimisation.lr:g} × {batch_size}/{BASE_BATCH}")
    if config.run.extend and not step:
        display.say(f"{run} has nothing to extend: training from the start")
    if groups and groups.share > MAX_SHARE:
        part = f"{groups.share:.0%} of the images that normalise a key also normalise its query"
        display.say(f"{part}: a larger batch has less")
    every = config.logging.knn_every * steps_per_epoch
    evaluations = Evaluations(knn, every, run, ranks, lambda: stop.received, mean, std)
    healths = HealthEvents(
        monitor, health_plan, last_step, logging.stop_on_collapse, config.method, probe, run, ranks,
        lambda: stop.received, display.say, step, mean, std,
    )  # fmt: skip
    compiles = is_compiled(method)
    views_dtype = AUTOCAST.get(optimisation.precision, torch.float32)
    views: Views | None = None  # one buffer for all steps of a size
    shown: tuple[int, ...] = ()  # its sides
    with closing:  # also before the report, which reads what is written until then
        if healths.due(step):
            with display.doing("measuring the representation"):
                stopped = healths(method, step, epoch, metrics)
        if evaluations.due(step) and not stopped:  # may not have been done when this checkpoint was written
            with display.aside("evaluating"):
                stopped = evaluations(method, step, epoch, metrics)
        display.status("making the first batch")
        while step < last_step and not stopped:
            epoch = step // steps_per_epoch
            size = config.views.size_at(epoch, optimisation.epochs)
            size_V = sides(recipe, size)
            for batch in metrics.timed(loader.epoch(epoch)):
                if size_V != shown:
                    display.status(f"{'compiling' if compiles else 'the first step'} at {size} px")
                    views, shown = None, size_V
                with metrics.making_views():
                    views = make_views(batch, recipe, size, config.run.seed, epoch, mean, std, views_dtype, out=views)
                if ranks.is_main and step == 0:
                    write_samples(run / "samples.png", batch, views, mean, std)
                seed_step(config.run.seed, step, ranks.rank)
                rates, progress = schedule(step), Progress(step / steps_per_epoch, schedule.epochs(step))
                label_B = on_device(batch.label_B, ranks.device)
                given_B = label_B if config.method.needs_labels else None
                terms = trainer.forward_backward(Sample(views, given_B, batch.index_B, progress))
                trainer.update(step, rates)
                if probe and label_B is not None:
                    probe.learn(trainer.features_NF, label_B, progress.part, trainer.good)
                lr, step = rates.lr, step + 1

                metrics.step(step, epoch, lr, ranks.mean(terms), trainer.skips_3)
                display.step(step)
                stopped = ranks.agree(stop.received)
                if healths.due(step) and not stopped:
                    with display.doing("measuring the representation"):
                        stopped = healths(method, step, epoch, metrics)
                due, ends = evaluations.due(step), bool(stopped) or step == last_step
                saves = ends or due or step % config.run.checkpoint_every == 0
                if saves and ranks.is_main:
                    metrics.flush(step, epoch, lr)  # what it knows of skipped steps is then up to this one
                if ranks.is_main and metrics.skips.too_many(step):
                    order = Order(store.num_samples, batch_size, config.run.seed)
                    raise not_finite(run, store, order, metrics.skips, step)
                # A periodic one is not written while steps are being skipped: it might push out good ones.
                if ranks.is_main and saves and (ends or due or not metrics.skips.in_a_row):
                    with display.doing("saving"):
                        state = state_of(step, settings, data, method, trainer, probe, loader)
                        save_checkpoint(run / "checkpoints", state, config.run.keep_last)
                if due and not stopped:
                    with display.aside("evaluating"):
                        stopped = evaluations(method, step, epoch, metrics)
                if stopped or ends:
                    break
        if stopped == COLLAPSED:
            if ranks.is_main:
                write_report(run)
            ranks.together(healths.refuse)
    if ranks.is_main:
        write_report(run)
        done = f"stopped by {signal.Signals(stopped).name}" if stopped else "done"
        print(f"{done} at step {step}; {run / 'report.html'}", file=sys.stderr, flush=True)
    ranks.close()
    return Finished(run, step, stopped)
