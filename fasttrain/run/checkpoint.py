"""Checkpoints: everything a run needs to go on, written so that nothing already saved can be lost.

A file is torch.save's, followed by a line with the SHA-256 of all before it, which torch.load does not mind.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import os
import pathlib
import pickle
import re
import shutil
import sys
from typing import BinaryIO, NamedTuple

import torch

from fasttrain.system.durable import publish, reason, replace_file, temporary_path
from fasttrain.system.errors import RunError, UserError, printable
from fasttrain.system.memory import is_full_memory
from fasttrain.system.regular import open_regular

FORMAT = 2
# What loading a state into networks or an optimizer raises where it is one of others.
UNFIT = (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError)
BEST, ANY_STEP = "best.pt", "step-*.pt"
KINDS = {"config": dict, "data": str, "method": dict}  # of what is read by name
SEAL = re.compile(rb"sha256 ([0-9a-f]{64})\n")
SEAL_BYTES = 72
READ_BYTES = 1 << 20


class CheckpointError(RunError):
    """A checkpoint can't be written, or is damaged or foreign."""


class Checkpoint(NamedTuple):
    """One that was read. digest: SHA-256 of what torch.save wrote."""

    path: pathlib.Path
    state: dict
    digest: str


def checkpoint_path(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / f"step-{step:09d}.pt"


def saved_checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a folder, newest first; none where nothing has that name.

    Raises RunError where they are out of sight: a link to storage that is away, or a folder that can't be listed.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return []
        raise RunError(f"the checkpoints in {folder} could not be looked for: {reason(error)}") from error
    return sorted((folder / name for name in fnmatch.filter(names, ANY_STEP)), reverse=True)


def last_good(folder: pathlib.Path, step: int) -> str:
    """The newest checkpoint up to a step, for a line that tells of an error."""
    newest = checkpoint_path(folder, step)
    try:
        return str(next((path for path in saved_checkpoints(folder) if path.name <= newest.name), "none yet"))
    except RunError:
        return f"out of sight in {folder}"


def save_checkpoint(folder: pathlib.Path, state: dict, keep_last: int) -> pathlib.Path:
    """Write state (with its "step"), then delete all but the newest keep_last up to that step (0: none).

    Atomic: written under a temporary name, flushed to the disk, renamed. Raises CheckpointError, naming the checkpoint
    before it, when it can't be written; those before it stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, state["step"])
    try:
        replace_file(path, lambda file: _write_sealed({"format": FORMAT, **state}, file))
    except (OSError, RuntimeError) as error:
        good = last_good(folder, state["step"])
        said = reason(error) if isinstance(error, OSError) else error
        raise CheckpointError(f"checkpoint {path} can't be written: {said}; the last good one: {good}") from error
    # One of a later step is none that this run has written or read: it must not push out those that are good.
    too_old = [other for other in saved_checkpoints(folder) if other.name <= path.name][keep_last:] if keep_last else []
    unfinished = folder.glob(temporary_path(pathlib.Path(ANY_STEP)).name)
    for useless in (*too_old, *unfinished):  # the latter: of a process that was killed while saving
        with contextlib.suppress(IsADirectoryError):  # not written here
            useless.unlink(missing_ok=True)
    return path


class _Hashed:
    """A file for torch.save to write to, which is hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()
        self.flush = file.flush
        self.failed: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failed = error
            raise


def _write_sealed(state: dict, file: BinaryIO) -> None:
    hashed = _Hashed(file)
    try:
        torch.save(state, hashed)  # type: ignore[arg-type]
    except RuntimeError:
        if hashed.failed:  # of which torch says only where it stood in the file
            raise hashed.failed from None
        raise
    file.write(f"sha256 {hashed.sha256.hexdigest()}\n".encode())


def keep_best(folder: pathlib.Path, step: int) -> None:
    """Let best.pt be the checkpoint of a step. It stays when that one is deleted, and is never the newest.

    A hard link where the file system has them, else a copy; atomic either way. Raises CheckpointError.
    """
    path, best = checkpoint_path(folder, step), folder / BEST
    try:
        if not _linked(path, best):
            with open(path, "rb") as source:
                replace_file(best, lambda file: shutil.copyfileobj(source, file, READ_BYTES))
    except OSError as error:
        raise CheckpointError(f"{best} can't be written: {reason(error)}") from error


def _linked(path: pathlib.Path, best: pathlib.Path) -> bool:
    temporary = temporary_path(best)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        return False
    publish(temporary, best)
    temporary.unlink(missing_ok=True)  # renaming one link to a file to another of the same does nothing
    return True


def load_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, executing nothing in it.

    Raises CheckpointError for a file that is damaged, in any byte, or foreign, and RunError for one that the system
    can't read, which says nothing of the file, and UserError for one of another version.
    """
    try:
        with open_regular(path) as file:
            digest = _checked(path, file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        if isinstance(error, CheckpointError) or is_full_memory(error):
            raise
        # EINVAL: no regular file, or damage led the reader out of it
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise RunError(
                f"checkpoint {path} could not be read: {error.strerror or error}; if it never can, move it away"
            ) from error
        said = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if isinstance(error, pickle.UnpicklingError):  # torch goes on to say how to run what is in it
            said = "it holds other things than tensors, numbers and text"
        raise CheckpointError(f"checkpoint {path} can't be read: {said}") from error
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"{path} is not a checkpoint of this program")
    if version != FORMAT:
        raise UserError(
            f"{path} was written by another version of fasttrain (format {version}, this one reads {FORMAT}): "
            "go on with that version, or start anew with another --run or --fresh"
        )
    if wrong := [name for name, kind in KINDS.items() if name in state and not isinstance(state[name], kind)]:
        raise CheckpointError(f"checkpoint {path} can't be read: its {wrong[0]} is of another type")
    if type(state.get("step")) is not int or state["step"] < 0:
        raise CheckpointError(f"checkpoint {path} can't be read: it does not tell its step")
    return Checkpoint(path, state, digest)


def _checked(path: pathlib.Path, file: BinaryIO) -> str:
    """The SHA-256 of a file without its seal. Raises CheckpointError where the seal is missing or has another."""
    left = os.fstat(file.fileno()).st_size - SEAL_BYTES
    file.seek(max(0, left))
    seal = SEAL.fullmatch(file.read())
    sha256 = hashlib.sha256()
    file.seek(0)
    while data := file.read(max(0, min(left, READ_BYTES))):
        sha256.update(data)
        left -= len(data)
    if not seal:
        raise CheckpointError(f"checkpoint {path} can't be read: its end is missing, or this program did not write it")
    if seal[1].decode() != sha256.hexdigest():
        raise CheckpointError(f"checkpoint {path} can't be read: its content has changed since it was written")
    return sha256.hexdigest()


def load_newest(folder: pathlib.Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; others passed over are named on stderr. None if there is none.

    Raises CheckpointError when there are checkpoints and none is whole, RunError when one can't be read just now, or
    they are out of sight.
    """
    paths = saved_checkpoints(folder)
    for path in paths:
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            said = printable(" ".join(str(error).split())[:300])  # a stranger's may quote itself
            print(f"warning: {said}; trying the one before", file=sys.stderr, flush=True)
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read; --fresh starts over")
    return None
