"""The run folder: config.json, metrics.jsonl, checkpoints/, samples.png, evaluation.json, ending.json, report.html."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import time
from dataclasses import asdict, dataclass
from typing import Any

from fasttrain import __version__
from fasttrain.run.earlier import named_now
from fasttrain.run.options import RunOptions
from fasttrain.system.durable import temporary_path, write_json
from fasttrain.system.errors import UserError
from fasttrain.system.lock import Lock, lock
from fasttrain.system.options import Settings
from fasttrain.system.regular import read_at_most

FORMAT = 2  # of config.json: the options have other names and meanings in each
MAX_BYTES = 1 << 20  # of it
LOCK = "lock"
CONFIG = pathlib.Path("config.json")
BEGUN = {LOCK, temporary_path(CONFIG).name}  # all there is in the folder of a run that ended before it had a config
# by the name that config.json has it under: a launcher's name for its job, the same in all its starts, and their count
LAUNCHERS = {
    "job": ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"), "slurm_job": ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
}  # fmt: skip
PATIENCE_SECONDS = 60.0  # that a run which was told to stop may take to write its checkpoint


@dataclass(frozen=True)
class DataRecord:
    """The images of a run, as its config.json tells of them.

    path: absolute, where they last lay. fingerprint: of the images trained on. mean, std: of the channels R, G, B in
    [0, 1], by which the run's views are normalised; no std is 0.
    """

    path: str
    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for what a damaged file may hold."""
        numbers = all(
            isinstance(each, tuple) and len(each) == 3 and all(type(v) is float and 0 <= v <= 1 for v in each)
            for each in (self.mean, self.std)
        )
        if not (isinstance(self.path, str) and isinstance(self.fingerprint, str) and numbers and all(self.std)):
            raise ValueError("path, fingerprint, mean and std of 3 numbers are expected")


def run_path(options: RunOptions) -> pathlib.Path:
    """Where a run lies: where it was told to, or a folder named after its method and the time."""
    name = options.method.replace(":", ".")
    return pathlib.Path(options.run or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def check_outside(run: pathlib.Path, images: pathlib.Path) -> None:
    """Raises UserError for a run inside a folder of images: what it keeps would be images of it the next time."""
    real_images, real_run = (pathlib.Path(os.path.realpath(path)) for path in (images, run))  # also of a link to itself
    if real_images in (real_run, *real_run.parents):
        raise UserError(f"{run} lies inside the folder of images {images}: choose another --run")


def prepare(run: pathlib.Path, settings: Settings, fresh: bool) -> Lock:
    """Make the folder and its config.json, or see that an existing one was made with the same settings.

    fresh moves an existing folder aside first, once in a job: not when its launcher has started it again. Returns a
    lock: while it is held, no other process can train here. Raises UserError for other settings, a folder that is
    no run, or one that another process is training in.
    """
    path = run / CONFIG
    if os.path.lexists(run) and not run.is_dir():
        raise UserError(f"{run} is no folder; choose another --run")
    with contextlib.suppress(FileNotFoundError):  # no folder yet, or not any more
        if not BEGUN.issuperset(os.listdir(run)) and not path.exists():
            raise UserError(f"{run} exists and is not a run folder; choose another --run")
    claim = _claim(run)
    while fresh and path.exists() and not same_job(path):  # asked again: others may have begun it meanwhile
        with claim:
            run.rename(_free_name(run))
        claim = _claim(run)
    if path.exists():
        # What may grow is bound by the checkpoints: an extension that has none yet may have been a slip.
        bound = {name: value for name, value in read_settings(path).items() if name not in settings.growing}
        if changed := settings.differences(bound):
            raise UserError(f"{run} has other settings: {'; '.join(changed)}; use another --run, or --fresh")
        return claim
    write_json(path, {"format": FORMAT, "config": settings.values, "environment": environment(), **jobs()})
    return claim


def keep_init(run: pathlib.Path, option: str, record: dict[str, Any]) -> None:
    """Record in the run's config.json the weights that an option named: source, digest, taken, of, not_taken. option:
    "init", those that it starts from, or "anchor"."""
    write_json(run / CONFIG, {**read_record(run / CONFIG), option: record})


def read_init(run: pathlib.Path) -> dict[str, Any]:
    """What keep_init has recorded of "init". Raises UserError where there is nothing."""
    found = read_record(run / CONFIG).get("init")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in ("source", "digest")):
        raise UserError(f"{run / CONFIG} does not tell of the weights that the run started from")
    return found


def keep_steps(run: pathlib.Path, last: int, per_epoch: int) -> None:
    """Record in the run's config.json the step that its training is to end at, and how many an epoch has."""
    content, steps = read_record(run / CONFIG), {"last": last, "per_epoch": per_epoch}
    if content.get("steps") != steps:
        write_json(run / CONFIG, {**content, "steps": steps})


def keep_saved(run: pathlib.Path, step: int) -> None:
    """Record in the run's config.json that a checkpoint of a step was saved; the first that is told of stays."""
    content = read_record(run / CONFIG)
    if "saved" not in content:
        write_json(run / CONFIG, {**content, "saved": step})


def has_saved(run: pathlib.Path) -> bool:
    """Has the run ever saved a checkpoint, by what its config.json tells? Raises UserError."""
    return "saved" in read_record(run / CONFIG)


def keep_data(run: pathlib.Path, data: DataRecord) -> None:
    """Record the images in the run's config.json, also where they have moved."""
    path = run / CONFIG
    content = read_record(path)
    if content.get("data") != json.loads(json.dumps(asdict(data))):
        write_json(path, {**content, "data": asdict(data)})


def read_data(run: pathlib.Path) -> DataRecord | None:
    """What config.json tells of the images; None for a run that ended before it was recorded. Raises UserError."""
    path = run / CONFIG
    found = read_record(path).get("data")
    try:
        return found and DataRecord(found["path"], found["fingerprint"], tuple(found["mean"]), tuple(found["std"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} does not tell of the run's images: {error}") from None


def config_of(run: pathlib.Path) -> pathlib.Path:
    """The config.json of a run. Raises UserError where there is none."""
    if not os.path.lexists(run / CONFIG):
        raise UserError(f"{run} is not a run folder (no config.json)")
    return run / CONFIG


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """All that a config.json holds, of which "config" is a dict. Raises UserError for any other file."""
    try:
        content = json.loads(read_at_most(path, MAX_BYTES))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as a run's configuration: {error}") from None
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or not all(isinstance(config.get(name, ""), str) for name in ("method", "preset")):
        raise UserError(f"{path} can't be read as a run's configuration: it holds no settings")
    return content


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """The options that a config.json holds, by name. Raises UserError for none, or one of an earlier version."""
    content = read_record(path)
    settings, version = content["config"], content.get("format")
    if version != FORMAT:
        raise UserError(
            f"{path} is of a run by an earlier version of fasttrain, whose options were others: start anew "
            "with another --run, or --fresh"
        )
    return named_now(settings)


def jobs() -> dict[str, str]:
    """What the launchers call the job this process belongs to; "" where one has no name, or there is none."""
    names = {key: os.environ.get(name, "") for key, (name, _) in LAUNCHERS.items()}
    return {key: "" if name == "none" else name for key, name in names.items()}  # torchrun's word for no name


def same_job(path: pathlib.Path) -> bool:
    """Was the folder begun by the job of this process, which its launcher has started again?

    torchrun does not count a start because a machine joined, but its name of a job tells. Slurm's name alone does not:
    all commands typed in one allocation have it. Nor does a count: the starts before may not have come to the folder.
    """
    begun: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # no folder yet, or a damaged one
        begun = read_record(path)
    now = jobs()
    if now["job"] and begun.get("job") == now["job"]:
        return True
    return any(
        os.environ.get(count, "") not in ("", "0") and begun.get(key, now[key]) == now[key]  # unknown: as it is now
        for key, (_, count) in LAUNCHERS.items()
    )


def _claim(run: pathlib.Path) -> Lock:
    """Make the folder and lock it. A run that was told to stop may still be writing its checkpoint when it is started
    again."""
    while True:
        run.mkdir(parents=True, exist_ok=True)
        try:
            return lock(run / LOCK, f"another process is training in {run}", PATIENCE_SECONDS)
        except FileNotFoundError:
            if (run / LOCK).is_symlink():  # to where nothing can be made
                raise
            # else another process has moved the folder aside


def _free_name(run: pathlib.Path) -> pathlib.Path:
    number = 1
    while (name := run.with_name(f"{run.name}.previous-{number}")).exists():
        number += 1
    return name


def environment() -> dict[str, str]:
    """Versions and machine, for the record."""
    import torch  # here, so that a configuration is read without it

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "fasttrain": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
    }  # fmt: skip
