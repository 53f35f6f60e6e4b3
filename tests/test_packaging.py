"""The wheel: all of it under one name, usable from anywhere, beside other people's packages."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from support.commands import ROOT
from support.pictures import make_images

from fasttrain import __version__

NAME = "fasttrain"


def pip(*words: object, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy, as a build leaves files in its checkout, at a path with a space."""
    if not importlib.util.find_spec("setuptools"):
        pytest.skip("setuptools is not installed")
    copy = tmp_path_factory.mktemp("checkout") / "a copy"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("fasttrain", "kernels", "dataprep"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


def built(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The wheel of a checkout or of a source archive."""
    done = pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(checkout: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return built(checkout, tmp_path_factory.mktemp("wheel"))


class Environment:
    """A virtual environment with the wheel in it; what that needs is found in this environment's packages."""

    def __init__(self, folder: pathlib.Path, wheel: pathlib.Path) -> None:
        self.folder, self.python = folder, folder / "venv/bin/python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=100)
        (self.packages,) = (folder / "venv/lib").glob("python*/site-packages")
        paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        (self.packages / "dependencies.pth").write_text("\n".join(paths) + "\n")
        self.before = set(os.listdir(self.packages))
        installed = self.install(wheel)
        assert installed.returncode == 0, installed.stderr

    def install(self, what: object) -> subprocess.CompletedProcess[str]:
        return pip("--python", self.python, "install", "--quiet", "--retries", 0, "--no-deps", what, cwd=self.folder)

    def run(self, *words: object) -> str:
        """What this interpreter, with these words, writes to stdout; fails if it fails."""
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.python), *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, cwd=self.folder, env=own, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def environment(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"), wheel)


def test_the_wheel_has_one_name_and_all_rooms(wheel: pathlib.Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {file.split("/")[0] for file in files} == {NAME, f"{NAME}-{__version__}.dist-info"}
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / NAME).rglob("*.py")}
    for room in ("kernels", "dataprep"):  # links, which rglob does not follow
        ours |= {f"{NAME}/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / room).rglob("*.py")}
    assert {file for file in files if file.endswith(".py")} == ours
    assert f"{NAME}/py.typed" in files


def test_a_source_archive_gives_the_same_wheel(
    checkout: pathlib.Path, wheel: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    code = f"import setuptools.build_meta; setuptools.build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True, timeout=100)
    (archive,) = tmp_path.glob("*.tar.gz")
    names = [zipfile.ZipFile(each).namelist() for each in (wheel, built(archive, tmp_path))]
    assert sorted(names[0]) == sorted(names[1])


def test_only_our_name_is_taken(environment: Environment) -> None:
    names = set(os.listdir(environment.packages)) - environment.before
    assert {name for name in names if not name.endswith(".dist-info")} == {NAME}


def test_commands_run_from_anywhere(environment: Environment) -> None:
    found = environment.run("-c", "import fasttrain; print(fasttrain.__file__)").strip()
    assert pathlib.Path(found).is_relative_to(environment.packages)
    assert "--data" in environment.run("-m", "fasttrain.train", "--help")
    assert "--max-side" in environment.run("-m", "fasttrain.dataprep.convert", "--help")
    make_images(environment.folder / "images", 2, 3)
    printed = environment.run("-m", "fasttrain.dataprep.convert", "images", "shards", "--workers", 1)
    assert json.loads(printed.splitlines()[-1])["images"] == 6


COMMANDS = "convert", "verify", "train", "evaluate", "embed", "export", "report", "runs"


def command(environment: Environment, name: str, *words: object) -> str:
    """What a console command of the environment writes, run from a folder that is no checkout."""
    # by its interpreter, as its own first line is too long for the kernel where the test's folder lies deep
    return environment.run(environment.python.with_name(f"fasttrain-{name}"), *words)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_console_command_tells_how_it_is_used(environment: Environment, name: str) -> None:
    assert f"fasttrain-{name} [-h]" in command(environment, name, "--help")


@pytest.mark.slow
def test_all_console_commands_do_their_work(environment: Environment) -> None:
    make_images(environment.folder / "pictures", 2, 12)
    command(environment, "convert", "pictures", "set", "--val-fraction", 0.25, "--workers", 1)
    command(environment, "verify", "set")
    small = "--arch", "small", "--size", 16, "--batch-size", 8, "--queue-size", 16, "--epochs", 1, "--seed", 3
    command(environment, "train", "--data", "set", "--run", "run", *small)
    assert "knn_top1" in json.loads(command(environment, "evaluate", "run", "--knn").splitlines()[-1])
    assert json.loads(command(environment, "embed", "run", "set", "out.npy").splitlines()[-1])["images"] == 24
    command(environment, "export", "run", "--to", "safetensors", "out.safetensors")
    command(environment, "report", "run")
    (listed,) = json.loads(command(environment, "runs", ".", "--json").splitlines()[-1])["runs"]
    assert (listed["run"], listed["state"]) == ("run", "done")
    assert (environment.folder / "run/report.html").stat().st_size > 1000


def test_hugging_faces_kernels_keep_their_name(environment: Environment) -> None:
    installed = environment.install("kernels")
    if installed.returncode:
        pytest.skip(f"kernels can't be installed here: {(installed.stderr.strip().splitlines() or ['?'])[-1]}")
    program = """
import importlib.metadata, importlib.util
assert importlib.metadata.packages_distributions()["kernels"] == ["kernels"]
print(importlib.util.find_spec("kernels").origin)
import fasttrain.kernels.similarity
"""
    origin = pathlib.Path(environment.run("-c", program).strip())
    assert origin == environment.packages / "kernels/__init__.py"
