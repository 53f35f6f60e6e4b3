"""Checkpoints survive what happens to disks."""

import errno
import hashlib
import os
import pathlib
from typing import Any

import pytest
import torch
from support.commands import one_line
from support.forks import finished, with_small_files

from fasttrain.run.checkpoint import (  # fmt: skip
    SEAL_BYTES,
    CheckpointError,
    keep_best,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    saved_checkpoints,
)
from fasttrain.system.cli import finish
from fasttrain.system.errors import RunError


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((1000,), float(step))}


def test_newest_is_loaded_and_old_ones_go(tmp_path: pathlib.Path) -> None:
    for step in (5, 10, 15, 2000):
        save_checkpoint(tmp_path, state(step), keep_last=2)
    assert [p.name for p in saved_checkpoints(tmp_path)] == ["step-000002000.pt", "step-000000015.pt"]
    assert load_newest(tmp_path).state["step"] == 2000
    assert not list(tmp_path.glob("*.tmp"))


def test_the_best_outlives_its_step_and_is_never_the_newest(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, link in ((1, os.link), (2, None)):  # None: a file system without hard links
        save_checkpoint(tmp_path, state(step), 1)
        if link is None:
            monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError(1, "no links")))
        keep_best(tmp_path, step)
        save_checkpoint(tmp_path, state(step + 10), 1)
        assert load_checkpoint(tmp_path / "best.pt").state["step"] == step
        assert load_newest(tmp_path).state["step"] == step + 10
        (tmp_path / f"step-{step + 10:09d}.pt").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
    with pytest.raises(CheckpointError, match=r"best.pt can't be written"):
        keep_best(tmp_path, 99)


def test_keep_all(tmp_path: pathlib.Path) -> None:
    for step in range(6):
        save_checkpoint(tmp_path, state(step), keep_last=0)
    assert len(saved_checkpoints(tmp_path)) == 6


def test_damaged_newest_falls_back_to_the_one_before(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path, state(1), 0)
    path = save_checkpoint(tmp_path, state(2), 0)
    path.write_bytes(path.read_bytes()[:1000])
    assert load_newest(tmp_path).state["step"] == 1
    assert "step-000000002.pt can't be read" in capsys.readouterr().err


def test_no_byte_can_change_unseen(tmp_path: pathlib.Path) -> None:
    """torch.load verifies nothing: a flipped bit in a tensor is a weight that nobody trained."""
    path = save_checkpoint(tmp_path, state(2), 0)
    whole = path.read_bytes()
    for place in {*range(0, len(whole), 97), *range(len(whole) - SEAL_BYTES, len(whole))}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path).digest == hashlib.sha256(whole[:-SEAL_BYTES]).hexdigest()


def test_a_changed_byte_is_passed_over_and_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path, state(1), 0)
    path = save_checkpoint(tmp_path, state(2), 0)
    keep_best(tmp_path, 2)
    with open(path, "r+b") as file:
        file.seek(path.read_bytes().index(state(2)["weights"].numpy().tobytes()) + 2000)
        file.write(b"\1")
    assert load_newest(tmp_path).state["step"] == 1
    assert "step-000000002.pt can't be read: its content has changed since it was written" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"best.pt can't be read: its content"):
        load_checkpoint(tmp_path / "best.pt")


def test_plain_torch_reads_ours(tmp_path: pathlib.Path) -> None:
    path = save_checkpoint(tmp_path, state(3), 0)
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(path, weights_only=True, **options)["weights"], state(3)["weights"])


@pytest.mark.parametrize("size", [0, 1, 71, 72, 73, 500, -1, -72, -73, -200])
def test_a_truncated_one_is_damaged(tmp_path: pathlib.Path, size: int) -> None:
    path = save_checkpoint(tmp_path, state(2), 0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="can't be read"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.EIO, "Input/output error"), RunError), (MemoryError(), MemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError),
    ],
)  # fmt: skip
def test_what_the_system_fails_to_do_is_no_damage(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    """Or a run would go on from an older checkpoint, and throw the newer ones aside, because a server was away."""
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step), 0)
    monkeypatch.setattr(torch, "load", lambda *_arguments, **_options: (_ for _ in ()).throw(error))
    with pytest.raises(raised) as caught:
        load_newest(tmp_path)
    assert not isinstance(caught.value, CheckpointError)
    if raised is RunError:
        assert "step-000000002.pt could not be read: Input/output error" in str(caught.value)


def test_later_ones_that_this_run_has_not_written_push_none_out(tmp_path: pathlib.Path) -> None:
    for step in (8, 12):
        save_checkpoint(tmp_path, state(step), 0)
    (tmp_path / "step-000000012.pt").write_bytes(b"damaged")
    save_checkpoint(tmp_path, state(10), keep_last=1)
    assert [p.name for p in saved_checkpoints(tmp_path)] == ["step-000000012.pt", "step-000000010.pt"]
    save_checkpoint(tmp_path, state(11), keep_last=2)
    assert [p.name for p in saved_checkpoints(tmp_path)][1:] == ["step-000000011.pt", "step-000000010.pt"]


def test_all_damaged_is_an_error_not_a_new_start(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path, state(1), 0).write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        load_newest(tmp_path)


def test_foreign_file_and_code_are_refused(tmp_path: pathlib.Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "step-000000001.pt")
    with pytest.raises(CheckpointError, match="this program did not write it"):
        load_checkpoint(tmp_path / "step-000000001.pt")
    path = save_checkpoint(tmp_path, {**state(1), "code": os.system}, 0)
    with pytest.raises(CheckpointError, match="can't be read: it holds other things than tensors"):
        load_checkpoint(path)


def test_no_checkpoint_is_none(tmp_path: pathlib.Path) -> None:
    assert load_newest(tmp_path / "nothing") is None


def _save_a_large_one(folder: pathlib.Path) -> int:
    return finish(lambda: save_checkpoint(folder, {"step": 2, "weights": torch.zeros(4_000_000)}, 1) and 0)


def test_full_disk_keeps_the_last_good_one(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, state(1), 3)
    process = finished(tmp_path, with_small_files, 1_000_000, _save_a_large_one, folder)
    assert process.returncode == 1, process.stderr
    assert "step-000000001.pt" in one_line(process)
    assert [p.name for p in folder.iterdir()] == ["step-000000001.pt"]
    assert load_newest(folder).state["step"] == 1
