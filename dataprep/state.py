"""What an unfinished conversion keeps in its folder, so that the same command continues it after any interruption.

`conversion.json`, there from the first moment until `manifest.json` is, holds what must not change in between; beside
each finished shard lies its record (fasttrain.dataprep.shards). convert.py locks the folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fasttrain.dataprep.shards import record_path
from fasttrain.formats.manifest import EXTENSION, FILE_NAME, STATE_FILE, Manifest
from fasttrain.system.durable import read_json, temporary_path, write_json
from fasttrain.system.errors import UserError


def finished_manifest(out: Path, settings: dict[str, Any]) -> Manifest | None:
    """Return the manifest if this very conversion is done, None if there is none; UserError if it is another one."""
    if not (out / FILE_NAME).exists():
        return None
    manifest = Manifest.load(out)
    _check_same(out, manifest.settings, settings)
    manifest.check_shards(out)
    return manifest


def begin(out: Path, state: dict[str, Any]) -> None:
    """Record the state in a new folder, or check that the folder's unfinished conversion has the same.

    Args:
        out: the folder, empty or with an unfinished conversion.
        state: the settings, and whatever else must not change before the last shard is written.

    Raises:
        UserError: the folder holds anything else.
    """
    path = out / STATE_FILE
    if path.exists():
        _check_same(out, _read_state(path), state)
    elif any(name != temporary_path(path).name for name in os.listdir(out)):
        raise UserError(f"{out} is not empty and holds no conversion: remove it or name another folder")
    else:
        write_json(path, state)


def clear_state(out: Path) -> None:
    """Remove what only an unfinished conversion needs: the records of shards, and the state."""
    for extension in EXTENSION.values():
        for path in out.glob(record_path(out, f"*-{'[0-9]' * 5}*{extension}").name):
            path.unlink(missing_ok=True)
    (out / STATE_FILE).unlink(missing_ok=True)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path, follow=False))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{path} was not written by a conversion: remove {path.parent} or name another folder"
        ) from None


def _check_same(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    names = [name for name in new if old.get(name) != new[name]]
    if names:
        what = "the source has changed" if names == ["source"] else f"other settings: {', '.join(names)}"
        raise UserError(f"{out} holds a conversion that differs ({what}): remove it or name another folder")
