"""Extending a finished run (--extend): only one that is finished, and config.json tells what it was extended by."""

from __future__ import annotations

import itertools
import pathlib
import time

from fasttrain.run.folder import CONFIG, read_record, read_settings
from fasttrain.system.durable import write_json
from fasttrain.system.errors import UserError
from fasttrain.system.options import Settings


def check_extension(run: pathlib.Path, settings: Settings, step: int, steps_per_epoch: int) -> None:
    """Raises UserError where the settings extend a run, of which config.json does not know, before it has finished.

    step: of the checkpoint that the run goes on from.
    """
    before, now = read_settings(run / CONFIG).get("extend", []), settings.values["extend"]
    shared = _shared(before, now)
    scheduled = (settings.values["epochs"] + sum(shared)) * steps_per_epoch
    if now not in (before, shared) and step < scheduled:
        same = f"with --extend {' '.join(map(str, shared))}" if shared else "without --extend"
        raise UserError(
            f"{run} has done {step} of {scheduled} steps, and what is extended is a finished run; finish it first, by "
            f"the same command {same}"
        )


def keep_extension(run: pathlib.Path, settings: Settings, step: int) -> None:
    """Record in config.json by what the run is extended, and the step and the time at which that began; instead of an
    extension that never came to a checkpoint."""
    path, extend = run / CONFIG, settings.values["extend"]
    content = read_record(path)
    before = content["config"].get("extend", [])
    if before == extend:
        return
    shared = _shared(before, extend)
    history = content.get("extended")
    extended = history[: len(history) - (shared != before)] if isinstance(history, list) else []
    if shared != extend:
        now = time.strftime("%Y-%m-%d %H:%M:%S%z")
        extended = [*extended, {"step": step, "extend": extend[len(shared) :], "time": now}]
    write_json(path, {**content, "config": {**content["config"], "extend": extend}, "extended": extended})


def _shared(before: list[int], now: list[int]) -> list[int]:
    """What both begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False))
    return [epochs for epochs, _ in pairs]
