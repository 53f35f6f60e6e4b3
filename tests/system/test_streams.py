"""Standard streams that are gone or full end nothing."""

import os
import pathlib
import subprocess
import sys

import pytest
from support.commands import ROOT

from fasttrain.system.cli import finish
from fasttrain.system.streams import Stream

TELLS_ALL = """
import sys
sys.path[:0] = sys.argv[1:2]
from fasttrain.system.cli import fail, finish
from fasttrain.system.streams import tell_at_once
def main():
    with open(sys.argv[2], "w") as file:
        file.write(str(file.fileno()))
        for tell in (fail, tell_at_once):
            tell("a line")
        print("progress", file=sys.stderr, flush=True)
    return 0
sys.exit(finish(main))
"""


def ends_with(redirections: str, tmp_path: pathlib.Path, program: str = TELLS_ALL) -> tuple[int, str]:
    """The status of a program started by a shell, and what its file holds."""
    words = [
        "sh",
        "-c",
        f'exec "$0" -c "$@" {redirections}',
        sys.executable,
        program,
        str(ROOT),
        str(tmp_path / "file"),
    ]
    status = subprocess.run(words, timeout=100, check=False).returncode
    return status, (tmp_path / "file").read_text("ascii")


@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", "<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_work_is_done_whatever_becomes_of_the_streams_and_no_file_takes_their_numbers(
    tmp_path: pathlib.Path, redirections: str
) -> None:
    status, content = ends_with(redirections, tmp_path)
    assert status == 0
    assert int(content) > 2
    assert "line" not in content


def test_a_pipe_without_a_reader_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8", closefd=False) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        for _ in range(3):
            assert finish(lambda: print("a line", file=sys.stderr, flush=True) or 0) == 0
        assert isinstance(sys.stderr, Stream)
        assert sys.stderr.lost
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what pipe holds yet goes there
    os.close(writer)


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_a_result_that_nobody_gets_is_a_failure(tmp_path: pathlib.Path, redirection: str) -> None:
    program = TELLS_ALL.replace("return 0", "print('{}')")
    assert ends_with(f"{redirection} 2>{tmp_path / 'errors'}", tmp_path, program + "#")[0] == 1
    assert "done, but the result could not be written" in (tmp_path / "errors").read_text("utf-8")


def test_a_status_that_says_more_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "w", encoding="utf-8") as closed:
        pass
    monkeypatch.setattr(sys, "stdout", closed)
    assert finish(lambda: print("{}") or 3) == 3


def test_an_odd_name_is_told_in_any_locale() -> None:
    program = """
import sys
sys.path[:0] = sys.argv[1:2]
from fasttrain.system.cli import fail, finish
sys.exit(finish(lambda: print(chr(0x3c4), chr(0xdce9)) or fail(chr(0xfc) + chr(0xdce9)) or 0))
"""
    own = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", program, ROOT], capture_output=True, env=own, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, b"\\u03c4 \\udce9\n"), done.stderr
    assert done.stderr == b"-c: error: \\xfc\\udce9\n"
