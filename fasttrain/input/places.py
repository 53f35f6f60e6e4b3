"""Where a data set is: on this machine, or elsewhere, behind a URL, from where its shards come to a cache."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fasttrain.input.options import CacheOptions
from fasttrain.storage.near import Folder, Near
from fasttrain.system.errors import UserError


class Place(NamedTuple):
    """A place, which messages call what was typed, without secrets.

    path: the folder, or file, on this machine; of a set elsewhere, its folder in the cache, where its manifest is.
    near: where its files can be read. url: without secrets; "" of a set on this machine.
    """

    path: Path
    near: Near
    url: str = ""

    def __str__(self) -> str:
        return self.url or str(self.path)

    @property
    def real(self) -> str:
        """What a run folder calls it."""
        return self.url or os.path.realpath(self.path)

    @property
    def stem(self) -> str:
        """The last part of its name."""
        return PurePosixPath(re.split("[?#]", self.real)[0]).name

    def exists(self) -> bool:
        """Whether there is anything."""
        return bool(self.url) or self.path.exists()

    def close(self) -> None:
        """Nobody waits for files of it any more."""
        self.near.close()


def located(data: str | os.PathLike[str] | Place, cache: CacheOptions | None = None) -> Place:
    """The place of what was typed. Of a set elsewhere, the manifest is fetched, and nothing else.

    Raises:
        UserError, RunError: of a set elsewhere, it has no manifest, or can't be had; the cache can't be used.
        ManifestError: its manifest is malformed.
    """
    if isinstance(data, Place):
        return data
    text = os.fspath(data)
    if "://" not in text:
        return Place(Path(text), Folder(Path(text)))
    from fasttrain.storage.cache import open_cache
    from fasttrain.storage.remote import is_remote, local_path

    if not is_remote(path := local_path(text)):
        return Place(Path(path), Folder(Path(path)))
    cache = cache or CacheOptions()
    found = open_cache(text, Path(cache.cache or _default_cache()).absolute(), round(cache.cache_gb * 1e9))
    return Place(found.folder, found, found.url)


def _default_cache() -> Path:
    above = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not above.is_absolute():
        raise UserError("--cache is missing: there is no home folder that shards could come to")
    return above / "fasttrain/shards"
