"""A lock keeps others out until it is closed or forgotten."""

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
