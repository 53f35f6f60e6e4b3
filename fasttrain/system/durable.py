"""Files that are old, new or absent, never half: whatever ends the process or the machine while they are written."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def replace_file(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file under a temporary name (its suffix is .tmp), flush it to the disk, and rename it.

    Raises what `write` does, and OSError; the temporary file is then gone and the old one is still there.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically: after a crash at any moment the file is absent, old or new, never half."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "w", encoding="ascii") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """Return the name that a file has, in the same folder, until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, and make the name survive a loss of power."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
