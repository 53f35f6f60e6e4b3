"""Extending a finished run (--extend): only one that is finished, and config.json tells what it was extended by."""

from __future__ import annotations

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
    scheduled = (settings.values["epochs"] + sum(before)) * steps_per_epoch
    if before != now and step < scheduled:
        same = f"with --extend {' '.join(map(str, before))}" if before else "without --extend"
        raise UserError(
            f"{run} has done {step} of {scheduled} steps, and what is extended is a finished run; finish it first, by "
            f"the same command {same}"
        )


def keep_extension(run: pathlib.Path, settings: Settings, step: int) -> None:
    """Record in config.json by what the run is extended, and the step and the time at which that began."""
    path, extend = run / CONFIG, settings.values["extend"]
    content = read_record(path)
    before = content["config"].get("extend", [])
    if before == extend:
        return
    new = {"step": step, "extend": extend[len(before) :], "time": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    history = content.get("extended")
    extended = [*history, new] if isinstance(history, list) else [new]
    write_json(path, {**content, "config": {**content["config"], "extend": extend}, "extended": extended})
