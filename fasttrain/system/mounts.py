"""Which file system a path is on."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_OF_THE_NETWORK = frozenset(
    (
        "9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs3", "nfs4", "smb3", "smbfs",
        "wekafs",
    )
)  # fmt: skip


def network_file_system(path: Path) -> str:
    """Return the type of a path's file system where it lies on other machines, or is made by a program; "" if not."""
    real = os.path.realpath(path)
    holding = [mount for mount in psutil.disk_partitions(all=True) if _lies_below(real, mount.mountpoint)]
    kind = max(holding, key=lambda mount: len(mount.mountpoint)).fstype if holding else ""
    return kind if kind in _OF_THE_NETWORK or kind.startswith("fuse.") else ""


def _lies_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
