"""Every command starts from a bare checkout, wherever it is typed."""

import pathlib

import pytest
from support.commands import ROOT, typed

COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for room in ("fasttrain", "dataprep")
    for path in (ROOT / room).glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
)


def test_there_are_commands() -> None:
    assert {"fasttrain/train.py", "dataprep/convert.py"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_how_it_is_used(command: str, tmp_path: pathlib.Path) -> None:
    done = typed(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{command} [-h]" in done.stdout
    assert done.stderr == ""
