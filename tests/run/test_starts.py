"""What config.json tells of each time that training was started."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from support.commands import ROOT

import fasttrain
from fasttrain.run import starts
from fasttrain.run.starts import command, commit, keep_start, starts_of


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "config.json").write_text('{"config": {"method": "moco"}}', "utf-8")
    return tmp_path


def kept(run: pathlib.Path) -> list[dict[str, Any]]:
    return starts_of(json.loads((run / "config.json").read_text("utf-8")))


def test_each_start_is_kept_up_to_a_number(run: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "MOST", 4)
    for step in range(8):
        keep_start(run, step, 4, 0)
    found = kept(run)
    assert [start["step"] for start in found] == [0, 5, 6, 7]
    assert {start["processes"] for start in found} == {4}
    assert json.loads((run / "config.json").read_text("utf-8"))["config"] == {"method": "moco"}


def test_a_start_tells_the_shuffle_that_was_taken(run: pathlib.Path) -> None:
    keep_start(run, 0, 1, 0)
    keep_start(run, 5, 1, 64)
    assert [start["shuffle"] for start in kept(run)] == ["global", "block, 64 shards at once"]


@pytest.mark.parametrize("damage", [None, 5, "x", [1], [{"step": -1}], [{"step": "x"}]])
def test_damaged_starts_are_left_out(run: pathlib.Path, damage: object) -> None:
    (run / "config.json").write_text(json.dumps({"config": {}, "starts": damage}), "utf-8")
    assert kept(run) == []
    keep_start(run, 7, 1, 0)
    assert [start["step"] for start in kept(run)] == [7]


def test_the_command_line_is_kept_of_our_own_command_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of another program, which trains by the library, may hold anything."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "fasttrain/train.py"), "--data", "two words"])
    assert command().endswith("fasttrain/train.py --data 'two words'")
    monkeypatch.setattr(sys, "argv", ["/bin/fasttrain-train", "--data", "x"])
    assert command() == "/bin/fasttrain-train --data x"
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "--key", "secret"])
    assert command() == ""


def test_the_commit_tells_of_changes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fasttrain"
    package.mkdir()
    file = package / "__init__.py"
    file.write_text("", "utf-8")
    monkeypatch.setattr(fasttrain, "__file__", str(file))
    assert commit() == ""
    who = "-c", "user.name=a", "-c", "user.email=a@b"
    for words in (
        ["init", "-q"],
        ["add", "."],
        [*who, "commit", "-qm", "first"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    whole = commit()
    assert len(whole) == 12
    file.write_text("1", "utf-8")
    assert commit() == f"{whole}-dirty"
    monkeypatch.setattr(starts, "COMMIT_SECONDS", 0.0)
    assert commit() == ""
