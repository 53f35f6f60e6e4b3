"""Every command starts from a bare checkout, wherever it is typed."""

import pathlib
import shutil

import pytest
from support.commands import COMMANDS, ROOT, typed


def test_there_are_commands() -> None:
    assert {"fasttrain/train.py", "dataprep/convert.py"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_how_it_is_used(command: str, tmp_path: pathlib.Path) -> None:
    done = typed(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{command} [-h]" in done.stdout
    assert done.stderr == ""


def test_an_installed_file_run_by_its_path_imports_its_own_package(tmp_path: pathlib.Path) -> None:
    """There, dataprep lies inside of fasttrain, whose folder would hide other packages, such as `kernels`."""
    installed = tmp_path / "site" / "fasttrain"
    shutil.copytree(ROOT / "fasttrain", installed, ignore=shutil.ignore_patterns("__pycache__"))
    with open(installed / "__init__.py", "a", encoding="utf-8") as file:
        file.write("import sys; print(sys.path[0])\n")
    done = typed(installed / "dataprep" / "demo.py", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "site")
