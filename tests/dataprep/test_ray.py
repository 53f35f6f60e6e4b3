"""--engine ray: the bytes of the local engine, on a real local cluster."""

import builtins
import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import typed
from support.pictures import make_images

from fasttrain.dataprep import convert
from fasttrain.dataprep.destination import LocalFolder
from fasttrain.dataprep.encode import Encoding, encode_samples
from fasttrain.dataprep.engines import Note, ShardWork, _connect, on_ray
from fasttrain.dataprep.plan import plan_shards
from fasttrain.dataprep.sources.kinds import open_source


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.usefixtures("ray_alone")
def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    source = make_images(tmp_path / "source", 2, 12)
    (source / "class0" / "bad.jpg").write_bytes(b"")
    options = ("--max-side", 48, "--shard-size", 6, "--workers", 2)
    local = typed("dataprep/convert.py", source, tmp_path / "local", *options, cwd=tmp_path)
    done = typed("dataprep/convert.py", source, tmp_path / "ray", *options, "--engine", "ray", cwd=tmp_path)
    assert local.returncode == done.returncode == convert.EXIT_SKIPPED, done.stderr
    assert "skipped class0/bad.jpg: empty file" in done.stderr
    assert files_of(tmp_path / "local") == files_of(tmp_path / "ray")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.usefixtures("ray_alone")
def test_a_failing_task_raises_its_own_error(tmp_path: Path) -> None:
    source = open_source(make_images(tmp_path / "source", 2, 4))
    encode = functools.partial(encode_samples, encoding=Encoding())
    work = ShardWork(LocalFolder(tmp_path / "missing"), source.reader, encode, False)
    with pytest.raises(FileNotFoundError, match="missing"):
        list(on_ray(work, plan_shards(source.splits, 4, "ffcv"), 1, Note(lambda _: None)))


@pytest.mark.parametrize(
    ("address", "started", "calls"),
    [
        (None, "none", [((), 3)]),
        ("local", "none", [((), 3)]),
        (None, "running", [((), 3), ((), None)]),
        (None, "killed", [((), 3), ((), None), (("local",), 3)]),
        ("ray://host:10001", "running", [((), None)]),
    ],
)
def test_only_a_cluster_that_was_made_to_be_joined_is(
    monkeypatch: pytest.MonkeyPatch, address: str | None, started: str, calls: list[tuple]
) -> None:
    """As ray.init does it: another program's own cluster is joined for the address "auto" only."""
    seen = []

    def init(*where: str, num_cpus: int | None = None, **_: object) -> None:
        seen.append((where, num_cpus))
        if where == () and address is None and started != "none":
            if num_cpus:
                raise ValueError("When connecting to an existing cluster, num_cpus and num_gpus must not be provided.")
            if started == "killed":
                raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    _connect(3)
    assert seen == calls


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    plain_import = builtins.__import__

    def without_ray(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return plain_import(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    source = make_images(tmp_path / "source", 1, 2)
    assert convert.main([str(source), str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert "--engine ray needs Ray: pip install ray" in capfd.readouterr().err
