"""The checkout, its commands as a person types them, and what they say when they end."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for room in ("fasttrain", "dataprep")
    for path in (ROOT / room).glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text("utf-8")
)
CORES = os.sched_getaffinity(0)  # before conftest gives each of pytest's workers a part of them


def typed(*words: object, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run a script of the checkout, named by its path there, in an interpreter of its own and from another folder."""
    command = [sys.executable, ROOT / str(words[0]), *words[1:]]
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=240, cwd=cwd, env=environment, check=False
    )


def one_line_of(errors: str) -> str:
    """The single error line among what a failed command wrote to stderr: asserts that there is no traceback."""
    assert "Traceback" not in errors, errors
    lines = [line for line in errors.splitlines() if ": error: " in line]
    assert len(lines) == 1, errors
    return lines[0]


def one_line(process: subprocess.CompletedProcess[str]) -> str:
    """The single error line of a failed command."""
    return one_line_of(process.stderr)
