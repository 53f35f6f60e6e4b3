"""What takes seconds to import is imported by what needs it, and no --help or mistyped option does."""

import os
import pathlib
import subprocess
import sys

import pytest
from support.commands import COMMANDS, ROOT, one_line_of

import fasttrain.input
import fasttrain.methods

LATE = {"torch", "torchvision", "timm", "transformers", "numba", "matplotlib", "pyarrow", "ray", "onnx"}


def started(folder: pathlib.Path, status: int, *words: object) -> tuple[set[str], str]:
    """Run Python with these words; returns the packages that it imported, and what else it wrote to stderr."""
    command = [sys.executable, "-X", "importtime", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=folder, env=environment, check=False
    )
    assert done.returncode == status, done.stderr
    lines = done.stderr.splitlines()
    times = [line for line in lines if line.startswith("import time:")]
    packages = {line.rpartition("|")[2].strip().partition(".")[0] for line in times}
    assert "fasttrain" in packages
    return packages, "\n".join(line for line in lines if line not in times)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_that_takes_long(command: str, tmp_path: pathlib.Path) -> None:
    packages, _ = started(tmp_path, 0, ROOT / command, "--help")
    assert not packages & LATE


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_option_imports_nothing_that_takes_long(command: str, tmp_path: pathlib.Path) -> None:
    packages, errors = started(tmp_path, 2, ROOT / command, "--no-such-option")
    assert not packages & LATE
    one_line_of(errors)


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "dino", "--help"], ["--method", "nope"], ["--data", "x", "--lr", "-1"],
        ["--data", "x", "--method", "moco", "--predictor-hidden", "8"], ["--config", "nowhere.json"],
    ],
)  # fmt: skip
def test_neither_does_what_training_refuses_for_its_options(words: list[str], tmp_path: pathlib.Path) -> None:
    packages, _ = started(tmp_path, 0 if "--help" in words else 2, ROOT / "fasttrain/train.py", *words)
    assert not packages & LATE


def test_nor_does_a_list_of_runs(tmp_path: pathlib.Path) -> None:
    run = tmp_path / "runs/one"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"config": {"method": "moco"}}')
    (run / "metrics.jsonl").write_text('{"step": 20, "images_per_sec": 7.0, "loss": 1.0}\n')
    for words in ([], ["--json"]):
        packages, _ = started(tmp_path, 0, ROOT / "fasttrain/runs.py", *words)
        assert not packages & LATE


@pytest.mark.parametrize("statement", ["import fasttrain", "from fasttrain import make_config; make_config()"])
def test_nor_do_the_package_and_a_configuration(statement: str, tmp_path: pathlib.Path) -> None:
    packages, _ = started(tmp_path, 0, "-c", statement)
    assert not packages & LATE


def test_the_package_alone_imports_little_but_itself(tmp_path: pathlib.Path) -> None:
    packages, _ = started(tmp_path, 0, "-c", "import fasttrain")
    assert not packages & {"numpy", "PIL", "rich", "tyro", "psutil"}


@pytest.mark.parametrize("package", [fasttrain.input, fasttrain.methods])
def test_what_is_imported_late_is_there(package: object) -> None:
    assert all(hasattr(package, name) for name in package.__all__)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # type: ignore[attr-defined] # noqa: B018
