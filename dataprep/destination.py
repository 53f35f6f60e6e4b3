"""OUT, where a conversion writes: a folder of this machine, or one that is far away.

Whatever is written is made by the code for local files, in a folder that is OUT itself, or one from which it is then
published to where OUT is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from fasttrain.dataprep.parts import Part, check_no_part, lock_part, moment
from fasttrain.formats.manifest import FILE_NAME, STATE_FILE, Manifest, ManifestError, glimpses
from fasttrain.storage.attempts import without_secrets
from fasttrain.storage.remote import REQUESTS, is_http, is_remote, local_path, opened
from fasttrain.storage.upload import list_folder, make_folder, read_small, remove, temporary_of, upload
from fasttrain.system.durable import naming, parse_json, read_json, temporary_path, write_json
from fasttrain.system.errors import UserError
from fasttrain.system.lock import Lock, lock

_SCRATCH, _LEFT_OVER_SECONDS = "fasttrain-convert-", 3600.0


class Destination(ABC):
    """A folder that a conversion fills, file by file; each is whole there, or absent.

    Errors of a folder far away are UserError and RunError, of one on this machine OSError.

    Attributes:
        beside: the copy of a source that is far away lies beside this path.
        shards_ahead: finished ones that may be on their way there while the next is written.
        requests: how many small files are read at once.
    """

    beside: Path
    shards_ahead: int
    requests: int

    @abstractmethod
    def __str__(self) -> str:
        """How messages call it."""

    @abstractmethod
    def absolute(self) -> Destination:
        """Return it as it is called from any folder."""

    @abstractmethod
    def make(self) -> None:
        """Make the folder if it is not there."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[object]:
        """Keep other conversions out, where that is possible. Raises UserError if one is there."""

    @abstractmethod
    def lock_part(self, part: Part) -> AbstractContextManager[object]:
        """Keep others from this part of a conversion, where that is possible. Raises UserError if one is at it."""

    @abstractmethod
    def moment(self) -> AbstractContextManager[object]:
        """Keep other parts from beginning or ending for a moment, where that is possible."""

    @abstractmethod
    def lock_copy(self, folder: Path) -> AbstractContextManager[object]:
        """Keep other conversions from the copy of a source, unless lock() does. Raises UserError."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the names of all that lies there now."""

    @abstractmethod
    def num_bytes(self, name: str) -> int:
        """Return the size of a file as of the last names(); -1 if it is no regular file. Raises FileNotFoundError."""

    @abstractmethod
    def glimpses(self, name: str) -> tuple[str, ...]:
        """Return the digests that tell a shard from another of its size; empty where they would cost too much."""

    @abstractmethod
    def read_json(self, name: str) -> Any:  # noqa: ANN401 - whatever it holds
        """Return what a JSON file holds. Raises FileNotFoundError, OSError, and ValueError for what is malformed."""

    @abstractmethod
    def read_manifest(self) -> Manifest | None:
        """Return the manifest, None if there is none. Raises ManifestError."""

    @abstractmethod
    def check_shards(self, manifest: Manifest) -> None:
        """Check that every shard of a manifest is there. Raises ManifestError."""

    @abstractmethod
    def folder(self) -> AbstractContextManager[Path]:
        """Give a folder of this machine, to make files in that are then published."""

    @abstractmethod
    def publish(self, paths: Sequence[Path], moved: Callable[[], None] = lambda: None) -> None:
        """Have whole files of folder() be there, in this order; moved is called when some bytes are on their way."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """Remove files, in this order as far as that is possible; those that are gone are passed over."""

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file, in place of an older one."""
        with self.folder() as folder:
            write_json(folder / name, value)
            self.publish([folder / name])

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest."""
        with self.folder() as folder:
            manifest.save(folder)
            self.publish([folder / FILE_NAME])

    @abstractmethod
    def begun(self, state: Mapping[str, Any]) -> None:
        """Hear what the state of the conversion is that writes here."""


class LocalFolder(Destination):
    """A folder of this machine, or one that several machines see. Files are made in it, under temporary names."""

    shards_ahead = requests = 1

    def __init__(self, path: Path) -> None:
        self.beside = self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def absolute(self) -> LocalFolder:
        return LocalFolder(self.path.resolve())

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def lock(self) -> Lock:
        held = lock(self.path, f"{self.path}: another conversion is writing here")
        check_no_part(self.path)
        return held

    def lock_part(self, part: Part) -> AbstractContextManager[object]:
        return lock_part(self.path, part)

    def moment(self) -> Lock:
        return moment(self.path)

    def lock_copy(self, folder: Path) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def names(self) -> list[str]:
        return os.listdir(self.path)

    def num_bytes(self, name: str) -> int:
        status = (self.path / name).lstat()
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    def glimpses(self, name: str) -> tuple[str, ...]:
        return glimpses(self.path / name)

    def read_json(self, name: str) -> Any:  # noqa: ANN401
        return read_json(self.path / name, follow=False)

    def read_manifest(self) -> Manifest | None:
        return Manifest.load(self.path) if (self.path / FILE_NAME).exists() else None

    def check_shards(self, manifest: Manifest) -> None:
        manifest.check_shards(self.path)

    def folder(self) -> AbstractContextManager[Path]:
        return contextlib.nullcontext(self.path)

    def publish(self, paths: Sequence[Path], moved: Callable[[], None] = lambda: None) -> None:
        """They are there already."""

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def begun(self, state: Mapping[str, Any]) -> None:
        """The lock keeps others out."""


class RemoteFolder(Destination):
    """A folder behind a URL. Files are made in a temporary folder of this machine, and leave it once they are there.

    Stores have no locks: two conversions with the same settings write the same bytes, and one with others ends when it
    finds that the state is not its own.
    """

    shards_ahead, requests = 4, REQUESTS

    def __init__(self, url: str) -> None:
        """Raises UserError, RunError: it can't be written, or the store does not answer."""
        self._shown = without_secrets(url).rstrip("/")
        if is_http(url):
            raise UserError(f"{self._shown}: over HTTP nothing can be written: name a folder, or s3://… and the like")
        if any(sign in self._shown for sign in "*?[{"):
            raise UserError(f"{self._shown}: name an OUT without * ? [ {{, which stand for other names")
        self._store, name = opened(url)
        self._root = name.rstrip("/")
        if not self._root:
            raise UserError(f"{without_secrets(url)}: name a folder there")
        self.beside = Path(self._shown.rpartition("/")[2] or "out")
        self._size: dict[str, int] = {}
        self._state: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return self._shown

    def absolute(self) -> RemoteFolder:
        return self

    def make(self) -> None:
        make_folder(self._store, self._root)

    def lock(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def lock_part(self, part: Part) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def moment(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def lock_copy(self, folder: Path) -> Lock:
        return lock(folder, f"{folder}: another conversion uses it")

    def names(self) -> list[str]:
        self._size = list_folder(self._store, self._root)
        return list(self._size)

    def num_bytes(self, name: str) -> int:
        if name not in self._size:
            raise FileNotFoundError(None, "not found", f"{self}/{name}")
        return self._size[name]

    def glimpses(self, name: str) -> tuple[str, ...]:
        return ()

    def read_json(self, name: str) -> Any:  # noqa: ANN401
        content = read_small(self._store, self._at(name))
        if content is None:
            raise FileNotFoundError(None, "not found", f"{self}/{name}")
        return parse_json(content)

    def read_manifest(self) -> Manifest | None:
        content = read_small(self._store, self._at(FILE_NAME))
        if content is None:
            return None
        with self.folder() as folder:
            (folder / FILE_NAME).write_bytes(content)
            try:
                return Manifest.load(folder)
            except ManifestError as error:
                raise ManifestError(str(error).replace(str(folder), str(self))) from None

    def check_shards(self, manifest: Manifest) -> None:
        self.names()
        shards = [shard for group in manifest.splits.values() for shard in group]
        for file in (file for shard in shards for file in shard.files() if file is not shard.names):
            if (found := self._size.get(file.name)) is None:
                raise ManifestError(f"{self}/{file.name}: not found")
            if found != file.num_bytes:
                raise ManifestError(f"{self}/{file.name}: {found} bytes, but the manifest says {file.num_bytes}")

    def folder(self) -> AbstractContextManager[Path]:
        return _scratch()

    def publish(self, paths: Sequence[Path], moved: Callable[[], None] = lambda: None) -> None:
        self._check_state()
        for path in paths:
            upload(self._store, path, self._at(path.name), moved)
            path.unlink()

    def remove(self, names: Sequence[str]) -> None:
        remove(self._store, [self._at(name) for name in names])

    def begun(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _check_state(self) -> None:
        """Raise UserError where a conversion with other settings has begun here at the same moment."""
        if self._state is not None:
            with contextlib.suppress(FileNotFoundError):  # one with the same settings has ended
                if self.read_json(STATE_FILE) != self._state:
                    raise UserError(f"{self}: another conversion, with other settings, is writing here")


def destination_of(out: str) -> Destination:
    """Return what a path or a URL names, which need not be there. Raises UserError, RunError: see RemoteFolder."""
    path = local_path(out)
    return RemoteFolder(out) if is_remote(path) else LocalFolder(Path(path))


def is_temporary_of(name: str, file: str) -> bool:
    """Whether a name is one that a file has until it is whole, on this machine or far away."""
    return name == temporary_path(Path(file)).name or temporary_of(name) == file


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Give a new folder where TMPDIR says. Those of conversions that were killed are removed: nobody holds them."""
    root = Path(gettempdir())
    for old in root.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError, UserError):  # somebody else's, or in use
            if time.time() - old.stat().st_mtime > _LEFT_OVER_SECONDS:
                with lock(old, "in use"):
                    shutil.rmtree(old, ignore_errors=True)
    with (
        TemporaryDirectory(prefix=_SCRATCH, dir=root, ignore_cleanup_errors=True) as name,
        lock(Path(name), "in use"),
        naming(Path(name)),  # it is full, and not OUT
    ):
        yield Path(name)
