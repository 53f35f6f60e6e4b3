"""What an unfinished conversion keeps in its folder, so that the same command continues it after any interruption.

`conversion.json`, there from the first moment until `manifest.json` is, holds what must not change in between; beside
each finished shard lies its record (fasttrain.dataprep.shards). convert.py locks the folder, where that is possible.
"""

from __future__ import annotations

import re
from typing import Any

from fasttrain.dataprep.destination import Destination, is_temporary_of
from fasttrain.dataprep.parts import is_part_lock
from fasttrain.dataprep.shards import record_name
from fasttrain.formats.manifest import EXTENSION, FILE_NAME, STATE_FILE, Manifest
from fasttrain.storage.upload import temporary_of
from fasttrain.system.errors import RunError, UserError

_RECORD = re.compile(record_name(f".+-[0-9]{{5}}.*({'|'.join(map(re.escape, EXTENSION.values()))})"))


def finished_manifest(out: Destination, settings: dict[str, Any]) -> Manifest | None:
    """Return the manifest if this very conversion is done, None if there is none; UserError if it is another one."""
    manifest = out.read_manifest()
    if manifest is not None:
        _check_same(out, manifest.settings, settings)
        out.check_shards(manifest)
    return manifest


def begin(out: Destination, state: dict[str, Any]) -> None:
    """Record the state in a new folder, or check that the folder's unfinished conversion has the same.

    Args:
        out: the folder, empty or with an unfinished conversion.
        state: the settings, and whatever else must not change before the last shard is written.

    Raises:
        UserError: the folder holds anything else.
        RunError: another process has ended the conversion since the manifest was looked for.
    """
    if (begun := _read_state(out)) is not None:
        _check_same(out, begun, state)
    elif names := [name for name in out.names() if not (is_temporary_of(name, STATE_FILE) or is_part_lock(name))]:
        if FILE_NAME in names:
            raise RunError(f"{out}: another process has just ended a conversion here: run the same command again")
        raise UserError(f"{out} is not empty and holds no conversion: remove it or name another folder")
    else:
        out.write_json(STATE_FILE, state)
    out.begun(state)


def clear_state(out: Destination) -> None:
    """Remove what only an unfinished conversion needs: the records of shards, and the state; and what uploads left.

    Locks of parts go last. One that is waited for meanwhile does no harm: whoever gets it finds the manifest.
    """
    names = out.names()
    records = [name for name in names if _RECORD.fullmatch(name) or temporary_of(name)]
    out.remove([*records, STATE_FILE, *filter(is_part_lock, names)])


def _read_state(out: Destination) -> dict[str, Any] | None:
    try:
        return dict(out.read_json(STATE_FILE))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        found = f"{out}/{STATE_FILE} was not written by a conversion"
        raise UserError(f"{found}: remove {out} or name another folder") from None


def _check_same(out: Destination, old: dict[str, Any], new: dict[str, Any]) -> None:
    names = [name for name in new if old.get(name) != new[name]]
    if "order" in names and "order" not in old and "seed" in old:
        raise UserError(
            f"{out} holds a conversion that an earlier version began, with the images in another order:"
            " remove it or name another folder"
        )
    if names:
        what = "the source has changed" if names == ["source"] else f"other settings: {', '.join(names)}"
        raise UserError(f"{out} holds a conversion that differs ({what}): remove it or name another folder")
