"""Checkpoints: everything a run needs to go on, written so that nothing already saved can be lost."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys

import torch

from fasttrain.cli import RunError

FORMAT = 1
BEST = "best.pt"


class CheckpointError(RunError):
    """No checkpoint could be written or read."""


def checkpoint_path(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / f"step-{step:09d}.pt"


def saved_checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def save_checkpoint(folder: pathlib.Path, state: dict, keep_last: int) -> pathlib.Path:
    """Write state (with its "step") as the newest checkpoint, then delete all but the newest keep_last (0: none).

    Atomic: written under a temporary name, flushed to the disk, renamed. Raises CheckpointError, naming the newest good
    checkpoint, when it can't be written; those before it stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, state["step"])
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        temporary.unlink(missing_ok=True)
        good = next(iter(saved_checkpoints(folder)), "none yet")
        raise CheckpointError(f"checkpoint {path} can't be written: {error}; the last good one: {good}") from error
    too_old = saved_checkpoints(folder)[keep_last:] if keep_last else []
    for useless in (*too_old, *folder.glob("step-*.tmp")):  # the latter: of a process that was killed while saving
        useless.unlink(missing_ok=True)
    return path


def keep_best(folder: pathlib.Path, step: int) -> None:
    """Let best.pt be the checkpoint of a step. It stays when that one is deleted, and is never the newest.

    A hard link where the file system has them, else a copy; atomic either way. Raises CheckpointError.
    """
    temporary = folder / "best.tmp"
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(checkpoint_path(folder, step), temporary)
        except OSError:
            shutil.copyfile(checkpoint_path(folder, step), temporary)
        os.replace(temporary, folder / BEST)
        _flush_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder / BEST} can't be written: {error}") from error


def _flush_folder(folder: pathlib.Path) -> None:
    """Make a rename in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: pathlib.Path) -> dict:
    """Read a checkpoint onto the CPU, executing nothing in it. Raises CheckpointError for a damaged or foreign file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        raise CheckpointError(f"checkpoint {path} can't be read: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program (format {FORMAT})")
    return state


def load_newest(folder: pathlib.Path) -> dict | None:
    """The newest checkpoint that can be read; damaged ones passed over are named on stderr. None if there is none.

    Raises CheckpointError when there are checkpoints and none can be read.
    """
    paths = saved_checkpoints(folder)
    for path in paths:
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            print(f"warning: {' '.join(str(error).split())[:300]}; trying the one before", file=sys.stderr, flush=True)
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read; --fresh starts over")
    return None
