"""A lock keeps others out until it is closed or forgotten."""

import os
import pathlib

import pytest

from fasttrain.system.errors import UserError
from fasttrain.system.lock import lock


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
