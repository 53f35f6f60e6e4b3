"""Pre-train an image encoder.

The file reads top to bottom: set up, the loop, the end. One step is on one screen.
"""

from __future__ import annotations

import contextlib
import pathlib
import signal
import sys
import threading
from dataclasses import replace
from typing import NamedTuple

import torch
from rich.console import Console

from fasttrain.config import TrainConfig
from fasttrain.engine.networks import initialise, is_compiled, make_networks
from fasttrain.engine.optim import Schedule
from fasttrain.engine.options import BASE_BATCH
from fasttrain.engine.precision import DTYPES, fastest_precision, slow
from fasttrain.engine.probe import OnlineProbe
from fasttrain.engine.ranks import Ranks, given_back
from fasttrain.engine.step import TrainStep
from fasttrain.engine.views import make_views, on_device
from fasttrain.evaluation.health_events import COLLAPSED
from fasttrain.evaluation.watched import Watched
from fasttrain.input import FolderStore, Loader, choose_shuffle, located, open_dataset, pixel_statistics
from fasttrain.jobs.batches import check_cache, make_groups, make_loader, make_order
from fasttrain.jobs.init import ANCHOR, Init, all_initial_weights, sources
from fasttrain.jobs.not_finite import not_finite
from fasttrain.jobs.report import write_report
from fasttrain.jobs.watch import make_watch, open_monitors
from fasttrain.kernels.augment import Views
from fasttrain.methods import Method, Progress, Sample
from fasttrain.networks.groups import MAX_SHARE
from fasttrain.run.checkpoint import save_checkpoint
from fasttrain.run.display import Display
from fasttrain.run.ending import begin_again, keep_ending
from fasttrain.run.extension import check_extension, keep_extension
from fasttrain.run.folder import (
    DataRecord,
    check_outside,
    keep_data,
    keep_init,
    keep_saved,
    keep_steps,
    prepare,
    run_path,
)
from fasttrain.run.health import Health
from fasttrain.run.metrics import REPLACED, Metrics, Sink
from fasttrain.run.resume import goes_on, resume
from fasttrain.run.samples import write_samples
from fasttrain.run.sinks import check_services, open_sinks
from fasttrain.run.starts import keep_start
from fasttrain.system.collectives import common_generator
from fasttrain.system.errors import RunError, UserError, note, printable
from fasttrain.system.lock import Lock
from fasttrain.system.options import Settings, replaced
from fasttrain.system.signals import StopSignal
from fasttrain.views.spec import sides

_alone = threading.Lock()  # held while this process trains: what is drawn comes from torch's one random state


class Finished(NamedTuple):
    """How a training has ended. run: its folder. step: the last that is done. stopped: the number of the signal that
    ended it, 0 for none."""

    run: pathlib.Path
    step: int
    stopped: int


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
    chosen = config.optimisation.precision
    if chosen == "auto":  # before it binds the run
        config = replaced(config, {"precision": ranks.share(fastest_precision(ranks.device))})
    elif ranks.is_main and (line := slow(chosen, ranks.device)):
        note(line)

    # What may be refused for its options or its data comes before the run folder is touched.
    method = make_networks(
        config.method, config.encoder, config.views, config.optimisation, config.machine, ranks.device, config.run.seed
    )
    trainer = TrainStep(method, config.optimisation, ranks.device, config.machine.cuda_graph)
    recipe = config.recipe
    place = located(config.data.data, config.data.elsewhere)
    closing.callback(place.close)
    config = replaced(config, {"data": place.url or config.data.data})  # which is kept, without secrets
    store = open_dataset(place, "train", config.data.loader, config.views.size, config.data.val_fraction)
    shuffle = ranks.share(choose_shuffle(store, place, config.data.shuffle, config.data.shuffle_window))
    cached = check_cache(place, store, shuffle, ranks.world_size, config.data.elsewhere)
    order = make_order(store, shuffle, config, ranks)
    loader = make_loader(store, order, config, ranks)
    closing.callback(loader.close)
    groups = make_groups(config, method, ranks)
    data = DataRecord(place.real, store.fingerprint, *pixel_statistics(place, config.data.loader))
    monitors = open_monitors(config, place, store, loader.steps_per_epoch, ranks)
    probe = monitors.probe

    # The first rank claims the folder; then all go on from the checkpoint that it chooses.
    settings = Settings.of(config)
    run = pathlib.Path(ranks.share(str(run_path(config.run))))
    given: dict[str, Init] = {}
    if sources(config) and not ranks.share(ranks.together(lambda: ranks.is_main and goes_on(run, config.run.fresh))):
        given = all_initial_weights(config, method.encoder, ranks)

    def begin() -> Lock:
        check_services(config.logging)
        if isinstance(store, FolderStore):
            check_outside(run, place.path)
        return prepare(run, settings, config.run.fresh)

    ranks.together(lambda: closing.enter_context(begin()) if ranks.is_main else None)
    step = stopped = 0
    collapsed: RunError | None = None
    if ranks.is_main:
        closing.push(lambda _kind, error, _trace: keep_ending(run, step, stopped, error or collapsed))

    def restore(state: dict) -> None:
        nonlocal data  # whose statistics belong to the run, as its weights do
        check_extension(run, settings, state["step"], loader.steps_per_epoch)
        data = replace(data, mean=state.get("mean", data.mean), std=state.get("std", data.std))
        method.load_state_dict(state["method"])
        trainer.load_state_dict(state)
        if "lanes" not in state["loader"] and ranks.is_main:
            note("an earlier version began this run: from here on its images come in another order")
        loader.load_state_dict({"lanes": 0, **state["loader"]})
        if probe:
            probe.load_state_dict(state.get("probe", {}))

    step = resume(run / "checkpoints", settings, store.fingerprint, ranks, restore)
    if step == 0:
        given = given or all_initial_weights(config, method.encoder, ranks)
        for option, init in given.items():
            initialise(method, init.weights, anchor=option == ANCHOR)
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
    health = Health(ranks.device, ranks.threads(config.machine.workers))

    def record() -> tuple[Sink, ...]:
        keep_data(run, data)
        for option, init in given.items() if step == 0 else ():
            keep_init(run, option, init.record)
        keep_extension(run, settings, step)
        keep_start(run, step, ranks.world_size, loader.state_dict()["lanes"])
        keep_steps(run, last_step, steps_per_epoch)
        if step:
            keep_saved(run, step)
        begin_again(run)
        return open_sinks(run, step, config.logging, settings.values)

    files = ranks.together(lambda: record() if ranks.is_main else ())
    display = Display(Console(stderr=True, quiet=not ranks.is_main), step, last_step, batch_size, health.hint)
    stop.tell = display.note
    metrics = Metrics((*files, display), health, ranks.device, config.logging.log_every, batch_size)
    closing.callback(metrics.close)
    display.say(f"learning rate {optimisation.peak_lr:g}: --lr {optimisation.lr:g} × {batch_size}/{BASE_BATCH}")
    if chosen == "auto" and optimisation.precision != "bf16":
        display.say(f"--precision {optimisation.precision}: this machine does not multiply in bf16")
    if (queue := getattr(config.method, "queue_size", 0)) > store.num_samples:
        display.say(f"--queue-size {queue} is more than the {store.num_samples} images: each is in it several times")
    if shuffle.reason and loader.state_dict()["lanes"] == order.lanes:
        display.say(shuffle.reason)
    if cached:
        display.say(cached)
    if config.run.extend and not step:
        display.say(f"{run} has nothing to extend: training from the start")
    if groups and groups.share > MAX_SHARE:
        part = f"{groups.share:.0%} of the images that normalise a key also normalise its query"
        display.say(f"{part}: a larger batch has less")
    watched = Watched(
        run, method, probe, mean, std, ranks, metrics, display, lambda: stop.received, first=step, last=last_step
    )
    watch = make_watch(config, monitors, steps_per_epoch, watched)
    compiles = is_compiled(method)
    views_dtype = DTYPES[optimisation.precision]
    views: Views | None = None  # one buffer for all steps of a size
    shown: tuple[int, ...] = ()  # its sides
    is_saved = step > 0
    with closing:  # also before the report, which reads what is written until then
        # may not have been done when this checkpoint was written
        stopped = watch.health(step, epoch) or watch.knn(step, epoch)
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

                # Its mean is the sum, without an exchange of its own; filled on the device, it is waited for by nobody.
                count = torch.full_like(terms["loss"], ranks.world_size * batch.replaced, dtype=torch.float32)
                metrics.step(step, epoch, lr, ranks.mean({**terms, REPLACED: count}), trainer.skips_3)
                display.step(step)
                stopped = ranks.agree(stop.received) or watch.health(step, epoch)
                due, ends = watch.knn.due(step), bool(stopped) or step == last_step
                saves = ends or due or step % config.run.checkpoint_every == 0
                if saves and ranks.is_main:
                    metrics.flush(step, epoch, lr)  # what it knows of skipped steps is then up to this one
                if ranks.is_main and metrics.skips.too_many(step):
                    taken = replace(order.continued(loader.state_dict()), rank=0, world_size=1)
                    raise not_finite(run, store, taken, metrics.skips, step)
                # A periodic one is not written while steps are being skipped: it might push out good ones.
                if ranks.is_main and saves and (ends or due or not metrics.skips.in_a_row):
                    with display.doing("saving"):
                        state = state_of(step, settings, data, method, trainer, probe, loader)
                        save_checkpoint(run / "checkpoints", state, config.run.keep_last)
                    if not is_saved:
                        keep_saved(run, step)
                        is_saved = True
                stopped = stopped or watch.knn(step, epoch)
                if stopped or ends:
                    break
        collapsed = watch.alarm.error
    if ranks.is_main:
        write_report(run)
    if stopped == COLLAPSED:
        ranks.together(watch.alarm.refuse)
    if ranks.is_main:
        done = f"stopped by {signal.Signals(stopped).name}" if stopped else "done"
        print(f"{done} at step {step}; {run / 'report.html'}", file=sys.stderr, flush=True)
    ranks.close()
    return Finished(run, step, stopped)
