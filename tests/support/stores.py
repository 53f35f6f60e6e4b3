"""Two stores of fsspec's kind that fail where a test wants them to: one of files on this disk, one of objects."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem


class Faults:
    """What happens to the next files that are written, one after the other, and what has been asked for.

    Attributes:
        next: "" for nothing; "cut", half of it is written and an error raised; "short", half of it is written;
            "damaged", another byte; "refused", no permission; "hang", it takes SECONDS; "killed", half of it is written
            and the process is no more (of Disk only).
        keeps: whether an object is written over only once it is removed.
        calls: what has been called, and with which file.
    """

    SECONDS = 1.0
    keeps = False
    next: ClassVar[list[str]] = []
    calls: ClassVar[list[tuple[str, str]]] = []

    @classmethod
    def clear(cls) -> None:
        cls.next.clear()
        cls.calls.clear()
        Objects.content.clear()

    @classmethod
    def written(cls) -> list[str]:
        """The names of the files that were written, in order."""
        return [name for call, name in cls.calls if call == "put"]


def _arrives(path: str, name: str) -> tuple[bytes, Exception | None]:
    """What arrives of a file, and the error after it."""
    Faults.calls.append(("put", name.rpartition("/")[2]))
    fault = Faults.next.pop(0) if Faults.next else ""
    content = Path(path).read_bytes()
    time.sleep(float(os.getenv("STORE_SECONDS", "0")))
    if fault == "hang":
        time.sleep(Faults.SECONDS)
    if fault == "refused":
        raise PermissionError(13, "Permission denied", name)
    if fault == "damaged":
        return content[:-1] + bytes([content[-1] ^ 1]), None
    if fault in ("cut", "short", "killed"):
        errors = {"cut": ConnectionResetError("reset"), "killed": ChildProcessError("killed")}
        return content[: len(content) // 2], errors.get(fault)
    return content, None


class Disk(LocalFileSystem):
    """Files on this disk: one is seen while it is written."""

    protocol = "disk"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return LocalFileSystem._strip_protocol(str(path).removeprefix("disk://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"disk://{name}"

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **_: Any) -> None:
        content, error = _arrives(lpath, rpath)
        Path(rpath).write_bytes(content)
        callback.relative_update(len(content))
        if isinstance(error, ChildProcessError):
            os.kill(os.getpid(), signal.SIGKILL)
        if error:
            raise error


class Objects(AsyncFileSystem):
    """Objects in memory. One is seen when it is whole, and its MD5 is told. `objects://USER:PASSWORD@bucket/name`."""

    protocol = "objects"
    cachable = False
    content: ClassVar[dict[str, bytes]] = {}

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return str(path).removeprefix("objects://").rpartition("@")[2].rstrip("/")

    def unstrip_protocol(self, name: str) -> str:
        return f"objects://me:hunter2@{name}"

    async def _put_file(self, lpath: str, rpath: str, callback: Any = None, **_: Any) -> None:
        if Faults.keeps and rpath in self.content:
            raise FileExistsError("File already exists!")
        content, error = _arrives(lpath, rpath)
        callback.relative_update(len(content))
        if error:
            raise error
        self.content[rpath] = content

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.content[path] = value

    async def _cat_file(self, path: str, **_: Any) -> bytes:
        self.calls("cat", path)
        if path not in self.content:
            raise FileNotFoundError(path)
        return self.content[path]

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        self.calls("info", path)
        return self._described(path)

    def _described(self, path: str) -> dict[str, Any]:
        if path not in self.content:
            raise FileNotFoundError(path)
        content = self.content[path]
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {"name": path, "size": len(content), "type": "file", "md5Hash": digest}

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self.calls("ls", path)
        found = [name for name in self.content if name.startswith(f"{path}/")]
        if not found and path not in self.content:
            raise FileNotFoundError(path)
        infos = [self._described(name) for name in found or [path] if "/" not in name[len(path) + 1 :]]
        below = {path + name[len(path) :].rpartition("/")[0] for name in found if "/" in name[len(path) + 1 :]}
        infos += [{"name": name, "size": 0, "type": "directory"} for name in sorted(below)]
        return infos if detail else [info["name"] for info in infos]

    async def _rm_file(self, path: str, **_: Any) -> None:
        self.calls("rm", path)
        if self.content.pop(path, None) is None:
            raise FileNotFoundError(path)

    @staticmethod
    def calls(call: str, path: str) -> None:
        Faults.calls.append((call, path.rpartition("/")[2]))


def register() -> None:
    """Make their protocols known in this process."""
    for kind in (Disk, Objects):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
