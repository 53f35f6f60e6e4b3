"""What huggingface_hub asks of the Hub for a repository of files, answered on this machine."""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from collections.abc import Callable
from typing import Any


def hub(
    repository: str, commits: dict[str, dict[str, bytes]], branches: dict[str, str]
) -> Callable[[str], bytes | None]:
    """Return what gives the body of an answer, JSON or a file, to the target of a request; None: there is nothing.

    commits: commit -> path -> content. branches: name -> commit.
    """

    def find(target: str) -> bytes | None:
        path, _, query = target.partition("?")
        head, _, rest = path.partition(f"/{repository}")
        if head == "/api/datasets":
            what, _, rest = rest.strip("/").partition("/")
            name, _, below = rest.partition("/")
            commit = branches.get(urllib.parse.unquote(name) or "main", name)
            if commit not in commits:
                return None
            if what == "tree":
                recursive = "recursive=true" in query.lower()
                return json.dumps(_tree(commits[commit], urllib.parse.unquote(below), recursive)).encode()
            return json.dumps({"id": repository, "sha": commit, "siblings": [], "tags": []}).encode()
        commit, _, name = rest.removeprefix("/resolve/").partition("/")
        return commits.get(commit, {}).get(urllib.parse.unquote(name))

    return find


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
    entries = [{"type": "directory", "path": path, "size": 0, "oid": "0"} for path in sorted(folders)]
    for path, content in files.items():
        sha256 = hashlib.sha256(content).hexdigest()
        stored = {"oid": sha256, "size": len(content), "pointerSize": 134}
        entries.append({"type": "file", "path": path, "size": len(content), "oid": sha256[:40], "lfs": stored})
    prefix = f"{below}/" if below else ""
    return [e for e in entries if e["path"].startswith(prefix) and (recursive or "/" not in e["path"][len(prefix) :])]
