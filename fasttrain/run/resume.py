"""Going on from a checkpoint: the first rank chooses it, every rank loads that very one, or all end."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Callable

from fasttrain.engine.ranks import Ranks
from fasttrain.run.checkpoint import UNFIT, Checkpoint, CheckpointError, load_checkpoint, load_newest, saved_checkpoints
from fasttrain.run.earlier import named_now
from fasttrain.run.folder import CONFIG, has_saved, same_job
from fasttrain.system.errors import RunError, UserError
from fasttrain.system.memory import is_full_memory
from fasttrain.system.options import Settings


def goes_on(run: pathlib.Path, fresh: bool) -> bool:
    """Whether a run that `prepare` is asked for will have a checkpoint to go on from."""
    is_run = (run / CONFIG).exists() and (not fresh or same_job(run / CONFIG))
    return is_run and any(saved_checkpoints(run / "checkpoints"))


def resume(
    folder: pathlib.Path, settings: Settings, fingerprint: str, ranks: Ranks, restore: Callable[[dict], None]
) -> int:
    """Give `restore` the state of the newest good checkpoint in a folder; returns its step, 0 where there is none.

    fingerprint: of the images this rank reads. Later checkpoints, none of which could be read, are renamed to
    *.unreadable. Raises UserError for one of other settings or images, and RunError, on every rank, where one can't
    read the one that the first has chosen, it does not fit, or all that were saved are gone.
    """
    newest = ranks.together(lambda: _newest(folder) if ranks.is_main else None)
    chosen = ranks.share((fingerprint, newest and (newest.path.name, newest.digest)))
    return ranks.together(lambda: _resume(folder, settings, fingerprint, newest, chosen, restore))


def _newest(folder: pathlib.Path) -> Checkpoint | None:
    """Nothing but a run that was ended before its first checkpoint may start over without being told to."""
    newest = load_newest(folder)
    if newest is None and has_saved(folder.parent):
        raise RunError(
            f"the checkpoints of {folder.parent} are gone: none is in {folder}; bring them back and the same command "
            "goes on, or --fresh starts over"
        )
    return newest


def _resume(
    folder: pathlib.Path, settings: Settings, fingerprint: str, found: Checkpoint | None, chosen: tuple,
    restore: Callable[[dict], None],
) -> int:  # fmt: skip
    """This rank's part. found: on the first rank, the checkpoint that is chosen."""
    images, name_and_digest = chosen
    if fingerprint != images:
        raise UserError(f"the images of {settings.values['data']} are others than those the first process reads")
    if not name_and_digest:
        return 0
    name, digest = name_and_digest
    is_first = found is not None
    checkpoint = found or load_checkpoint(folder / name)
    if checkpoint.digest != digest:
        raise RunError(f"{checkpoint.path} is another file than the first process reads; all must see the same --run")
    _restore(checkpoint, settings, fingerprint, restore)
    if is_first:
        _set_aside_later(checkpoint.path)
        print(f"continuing {folder.parent} from step {checkpoint.state['step']}", file=sys.stderr, flush=True)
    return checkpoint.state["step"]


def _restore(checkpoint: Checkpoint, settings: Settings, fingerprint: str, restore: Callable[[dict], None]) -> None:
    if objection := _objection(checkpoint.state, settings, fingerprint):
        raise UserError(f"{checkpoint.path}, {objection}; {_way_out(checkpoint.path, settings, fingerprint)}")
    try:
        restore(checkpoint.state)
    except UNFIT as error:
        if is_full_memory(error):
            raise
        raise CheckpointError(
            f"{checkpoint.path} does not fit these networks; {_way_out(checkpoint.path, settings, fingerprint)}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _objection(state: dict, settings: Settings, fingerprint: str) -> str:
    """What keeps this run from going on from a state, or ""."""
    if changed := settings.differences(named_now(state.get("config", {}))):
        return f"a checkpoint of other settings: {'; '.join(changed)}"
    if state.get("data") != fingerprint:
        images = settings.values["data"]
        return f"a checkpoint of a run begun with other images, or in another order, than those of {images}"
    return ""


def _way_out(path: pathlib.Path, settings: Settings, fingerprint: str) -> str:
    """What to do about a checkpoint that does not fit: offers the newest one before it that does."""
    for older in saved_checkpoints(path.parent):
        with contextlib.suppress(RunError, UserError):
            state = load_checkpoint(older).state if older.name < path.name else None
            if state and not _objection(state, settings, fingerprint):
                return f"move it away and the same command continues from step {state['step']}, or use --fresh"
    return "use another --run, or --fresh to start over"


def _set_aside_later(path: pathlib.Path) -> None:
    """Rename those after the newest good one, so that no name says that a later step is saved than is."""
    for later in saved_checkpoints(path.parent):
        if later.name > path.name:
            later.rename(later.with_name(f"{later.name}.unreadable"))
