"""Files that are far away, behind any PROTOCOL:// that fsspec knows: what lies there.

fsspec, and the package that a protocol needs, are imported where a source is such a URL. Credentials are those that
these packages look for themselves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fasttrain.formats.boundary import one_line
from fasttrain.formats.listing import SourceError
from fasttrain.storage import attempts
from fasttrain.storage.attempts import tried, without_secrets
from fasttrain.storage.patterns import expand
from fasttrain.system.errors import UserError, note
from fasttrain.system.ordered import map_in_order

REQUESTS = 16  # under way at once: a round trip costs more than the bytes of a photograph
_IN_EXTRA = ("fsspec", "aiohttp", "huggingface_hub", "s3fs", "gcsfs")  # modules
_LONGEST_PART = 255  # bytes of a file's name, on most disks
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# What stores call a digest or version of the content, and its time.
_MARKS = ("md5Hash", "crc32c", "blob_id", "xet_hash", "ETag", "etag")  # those of the bytes alone come first
_TIMES = ("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "uploaded_at", "created")


class RemoteFile(NamedTuple):
    """One file of a store.

    Attributes:
        name: as the file system calls it.
        path: below the listing's folder, forward slashes; safe to make.
        size: bytes; None if the server does not say.
        mark: a digest or version of the content, "" if the store has none.
        time: when it was written, as the store says it; "" where there is a mark.
        sha256: hex, "" if the store does not know it.
    """

    name: str
    path: str
    size: int | None
    mark: str
    time: str
    sha256: str


class Remote(NamedTuple):
    """What lies at a URL, at one time.

    Attributes:
        store: fsspec's file system.
        url: with the revision that a name of one (a branch) stood for.
        files: sorted by path.
        folders: that may be empty.
        within: what stands for the URL in a folder that holds the files: a path, a pattern, or "".
    """

    store: Any
    url: str
    files: list[RemoteFile]
    folders: list[str]
    within: str

    def digest(self, times: bool = False) -> str:
        """Return the SHA-256 (hex) of paths, sizes and marks; with times, also of when files were written."""
        digest = hashlib.sha256()
        for path in self.folders:
            digest.update(f"{path}/\n".encode("utf-8", "surrogatepass"))
        for file in self.files:
            line = f"{file.path}\0{file.size}\0{file.mark}\0{file.time if times else ''}\n"
            digest.update(line.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def is_remote(source: str) -> bool:
    """Whether a source is a URL."""
    return _PROTOCOL.match(source) is not None


def protocol_of(url: str) -> str:
    """Return the protocol of a URL, in small letters."""
    found = _PROTOCOL.match(url)
    assert found
    return found[1].lower()


def is_http(url: str) -> bool:
    """Whether a URL is of a server of the web, which lists nothing."""
    return protocol_of(url) in ("http", "https")


def local_path(source: str) -> str:
    """Return the path of a source on this machine, also of the URL of one; what it returns for others is none."""
    return source.partition("://")[2] if is_remote(source) and protocol_of(source) in ("file", "local") else source


def list_remote(url: str) -> Remote:
    """List what a URL names: a file, a folder, or by braces and wildcards several files.

    Raises:
        UserError, SourceError: it can't be read, or can't be copied as it is.
        RunError: the store fails, or does not answer.
    """
    store, name = opened(url)
    if protocol_of(url) == "hf":
        url = _pinned(store, url, name)
        name = store._strip_protocol(url)
    store.invalidate_cache()
    if is_http(url):
        return _listed_http(store, url)
    shown = without_secrets(url)
    try:
        info = tried(lambda: store.info(name), shown)
    except UserError:
        if not re.search(r"[*?[{]", name):
            raise
        root = re.split(r"[*?[{]", name, maxsplit=1)[0].rpartition("/")[0]
        return _of_files(store, url, root, _matches(store, name), name[len(root) + 1 :])
    if info["type"] == "directory":
        root = name.rstrip("/")
        found = tried(lambda: store.find(root or name, withdirs=True, detail=True), shown, attempts.LISTING_SECONDS)
        found.pop(root, None)
        found.pop(f"{root}/", None)
        return _of_files(store, url, root, found, "")
    root, _, last = name.rpartition("/")
    return _of_files(store, url, root, {name: info}, last)


def opened(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and its name there. Raises UserError, also for a missing package; RunError."""
    shown = without_secrets(url)
    try:
        from fsspec.core import url_to_fs

        if "::" in url.partition("?")[0]:
            raise UserError(f"{shown}: chains of URLs are not read: name the file itself")
        options = _http_options() if is_http(url) else {}
        return tried(lambda: url_to_fs(url, **options), shown)
    except ImportError as error:
        missing = (getattr(error.__cause__, "name", None) or error.name or protocol_of(url)).partition(".")[0]
        # Of other packages fsspec says what they are called, which may be another name than that of the module.
        how = "pip install '.[remote]'" if missing in _IN_EXTRA else one_line(str(error))
        raise UserError(f"{shown} needs {missing}: {how}") from None


def _http_options() -> dict[str, Any]:
    from aiohttp import ClientTimeout
    from fsspec.config import conf

    # By default a whole file has to come within five minutes, and may come compressed, of another size.
    timeout = ClientTimeout(total=None, sock_connect=attempts.SECONDS, sock_read=attempts.SECONDS)
    found: dict[str, Any] = {"client_kwargs": {"trust_env": True}, "headers": {}}
    for name, own in ((name, conf.get(protocol, {})) for protocol in ("http", "https") for name in found):
        found[name] |= own.get(name, {})
    found["client_kwargs"] |= {"timeout": timeout}
    found["headers"] |= {"Accept-Encoding": "identity"}
    return found


def _pinned(store: Any, url: str, name: str) -> str:  # noqa: ANN401 - fsspec's file system
    """Return the URL of a repository with the commit that its revision is now."""
    from huggingface_hub import HfApi

    shown = without_secrets(url)
    place = tried(lambda: store.resolve_path(name), shown)
    if not hasattr(place, "repo_id"):  # a bucket, which has no commits
        return url
    api = HfApi(endpoint=store.endpoint, token=store.token)
    info = tried(lambda: api.repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision), shown)
    kind = "" if place.repo_type == "model" else f"{place.repo_type}s/"
    return f"hf://{kind}{place.repo_id}@{info.sha}/{place.path_in_repo}".rstrip("/")


def _matches(store: Any, pattern: str) -> dict[str, Any]:  # noqa: ANN401
    """Return the files that a pattern names, with what the store says of each."""
    found: dict[str, Any] = {}
    shown = without_secrets(store.unstrip_protocol(pattern))

    def glob(wild: str) -> Iterable[str]:
        matched = tried(lambda: store.glob(wild, detail=True), shown, attempts.LISTING_SECONDS)
        files = {name: info for name, info in matched.items() if info["type"] == "file"}
        found.update(files)
        return files

    found.update(_looked_at(store, [name for name in expand(pattern, glob) if name not in found]))
    if not found:
        raise SourceError(f"{shown}: no file has such a name")
    return found


def _looked_at(store: Any, names: list[str]) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    def info(name: str) -> Any:  # noqa: ANN401
        return tried(lambda: store.info(name), without_secrets(store.unstrip_protocol(name)))

    return zip(names, map_in_order(info, names, REQUESTS), strict=True)


def _listed_http(store: Any, url: str) -> Remote:  # noqa: ANN401
    """Return the file of a URL, or those that its braces name: a folder can't be listed, nor wildcards resolved."""
    bare, shown = re.split("[?#]", url, maxsplit=1)[0], without_secrets(url)
    numbered = "name its files, as in shard-{000..012}.tar"
    if bare.endswith("/") or "*" in bare:
        raise UserError(f"{shown}: over HTTP a folder can't be listed: {numbered}")
    found = dict(_looked_at(store, expand(url, wildcards="")))
    if page := next((name for name, info in found.items() if info.get("mimetype") == "text/html"), None):
        raise UserError(f"{without_secrets(page)}: a page of text, no file of images; of a folder, {numbered}")
    root = bare.partition("{")[0].rpartition("/")[0]
    return _of_files(store, url, root, found, bare[len(root) + 1 :])


def _of_files(store: Any, url: str, root: str, found: dict[str, Any], within: str) -> Remote:  # noqa: ANN401
    """Return a listing of what a store says lies below root; SourceError for what no folder on disk could hold."""
    shown, http = without_secrets(url), is_http(url)
    files: dict[str, RemoteFile] = {}
    folders, others = set[str](), list[str]()
    for name, info in found.items():
        bare = re.split("[?#]", name, maxsplit=1)[0] if http else name
        is_folder = info["type"] == "directory" or (bare.endswith("/") and info["size"] == 0)  # made to mark one
        path = _safe_path(bare.removesuffix("/") if is_folder else bare, root, shown)
        if path != within and any(part.startswith(".") for part in path.split("/")):
            continue  # as on disk, hidden ones are passed over
        folders.update(path[: place.start()] for place in re.finditer("/", path))
        if is_folder:
            folders.add(path)
        elif info["type"] == "file":
            if path in files:
                raise SourceError(f"{shown}: two files are called {path}")
            files[path] = _file(name, path, info)
            if files[path].size is None and not http:
                raise SourceError(f"{shown}: the store does not say how large {path} is")
        else:
            others.append(path)
    if others:
        note(f"not copied, since they are no files: {len(others)}, first {others[0]}")
    for path in folders & files.keys():
        if files.pop(path).size:  # empty, it is how tools mark a folder
            raise SourceError(f"{shown}: {path} is both a file and a folder, which no disk can hold")
    if not files:
        raise SourceError(f"{shown}: no files")
    return Remote(store, url, [files[path] for path in sorted(files)], sorted(folders), within)


def _safe_path(name: str, root: str, shown: str) -> str:
    """Return the path of a name below root; SourceError for one that would lie elsewhere, or nowhere."""
    path = name.removeprefix(f"{root}/")
    try:
        parts = path.encode().split(b"/")
    except UnicodeEncodeError:
        parts = []
    if path == name or not parts or b"\0" in b"".join(parts) or not all(map(_can_be_made, parts)):
        raise SourceError(f"{shown}: a file's name can't be one on disk: {without_secrets(repr(name))}")
    return path


def _can_be_made(part: bytes) -> bool:
    return part not in (b"", b".", b"..") and len(part) <= _LONGEST_PART


def _file(name: str, path: str, info: dict[str, Any]) -> RemoteFile:
    mark = next((str(info[key]) for key in _MARKS if info.get(key)), "")
    time = "" if mark else next((str(info[key]) for key in _TIMES if info.get(key)), "")
    size = None if info["size"] is None else int(info["size"])
    return RemoteFile(name, path, size, mark, time, (info.get("lfs") or {}).get("sha256") or "")
