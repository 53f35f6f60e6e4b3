"""Fixtures shared by all tests: a small labelled image folder, the same converted, and commands run as typed."""

import functools
import os
import pathlib

import pytest
import torch
from support.commands import CORES
from support.forks import RunCommand, run_script
from support.pictures import make_images

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run in Python, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What no reader of files expects fails a test, instead of becoming a line that says the file is damaged.
os.environ.setdefault("FASTTRAIN_DEBUG", "1")
# FFCV, which is a test's peer, has numba start threads: with TBB a process that has one core never ends.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
os.environ.setdefault("NUMBA_NUM_THREADS", str(len(CORES)))


def pytest_configure(config: pytest.Config) -> None:
    """Workers side by side keep to cores of their own: threads of all on all cores would wait for each other."""
    worker = getattr(config, "workerinput", None)
    if worker and worker["workercount"] <= len(CORES):
        place = int(worker["workerid"].removeprefix("gw"))
        os.sched_setaffinity(0, sorted(CORES)[place :: worker["workercount"]])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """72 training and 24 validation images of 4 classes, as train/ and val/."""
    root = tmp_path_factory.mktemp("images")
    make_images(root / "train", 4, 18)
    make_images(root / "val", 4, 6, seed=1)
    return root


def converted(images: pathlib.Path, out: pathlib.Path, kind: str) -> pathlib.Path:
    from fasttrain.dataprep.convert import main

    assert main([str(images), str(out), "--format", kind, "--shard-size", "30", "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="session")
def shards(image_folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """image_folder as .beton shards, three of them for training."""
    return converted(image_folder, tmp_path_factory.mktemp("converted") / "shards", "ffcv")


@pytest.fixture(scope="session")
def tar_shards(image_folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """image_folder as WebDataset tars with their index files; the samples of `shards` in the same order."""
    return converted(image_folder, tmp_path_factory.mktemp("tars") / "shards", "webdataset")


@pytest.fixture
def ray_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of Ray of the test's own, whatever else runs on this machine."""
    monkeypatch.setenv("RAY_ADDRESS", "local")


@pytest.fixture
def run_command(tmp_path: pathlib.Path) -> RunCommand:
    """Run one of the project's commands as a person would, from another folder; returns how it ended."""
    return functools.partial(run_script, cwd=tmp_path)
