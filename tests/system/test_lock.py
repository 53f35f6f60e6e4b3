"""A lock keeps others out until it is closed or forgotten."""

import contextlib
import fcntl
import os
import pathlib

import pytest

from fasttrain.system.errors import UserError
from fasttrain.system.lock import is_held, lock


@pytest.mark.parametrize("name", ["", "lock"])
def test_one_holder_at_a_time(tmp_path: pathlib.Path, name: str) -> None:
    with lock(tmp_path / name, "taken"), pytest.raises(UserError, match="taken"):
        lock(tmp_path / name, "taken")
    held = lock(tmp_path / name, "taken")
    held.close()
    held.close()
    forgotten = lock(tmp_path / name, "taken")
    del forgotten
    lock(tmp_path / name, "taken").close()


@pytest.mark.parametrize("name", ["", "lock"])
def test_a_lock_whose_folder_is_moved_away_before_it_is_had_keeps_nobody_out_of_what_lies_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, real, after = tmp_path / "run", fcntl.flock, ["again", "held", "gone"]

    def flock(descriptor: int, operation: int) -> None:
        if after:
            then = after.pop()
            folder.rename(tmp_path / f"before {then}")
            if then != "gone":
                folder.mkdir()
            if then == "held":
                other = os.open(folder / name, os.O_RDONLY | (os.O_CREAT if name else 0))
                stack.callback(os.close, other)
                real(other, fcntl.LOCK_EX)
        real(descriptor, operation)

    folder.mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.ExitStack() as stack:
        with pytest.raises(FileNotFoundError):
            lock(folder / name, "taken")
        folder.mkdir()
        with pytest.raises(UserError, match="taken"):
            lock(folder / name, "taken")
    with lock(folder / name, "taken"), pytest.raises(UserError, match="taken"):
        lock(folder / name, "taken")
    assert not after


def test_a_fifo_in_its_place_is_not_waited_for(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(OSError, match="lock"):
        lock(tmp_path / "lock", "taken")


def test_who_asks_learns_whether_it_is_held_and_keeps_nobody_out(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    assert not path.exists()
    with lock(path, "taken"):
        assert is_held(path)
        assert is_held(path)
    assert not is_held(path)
    lock(path, "taken").close()


def test_who_asks_does_not_take_others_who_ask_for_a_holder(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not is_held(path)


def test_a_fifo_has_no_holder_that_could_be_known(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(OSError, match="not a regular file"):
        is_held(tmp_path / "lock")
