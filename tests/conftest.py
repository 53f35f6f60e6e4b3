"""Fixtures shared by all tests: a small labelled image folder, and the same converted."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run in Python, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU here"))


def make_images(folder: pathlib.Path, classes: int, per_class: int, seed: int = 0) -> pathlib.Path:
    """A class per folder; each class has its own stripe direction and period, all sizes differ."""
    generator = np.random.default_rng(seed)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            height, width = generator.integers(36, 72, 2)
            y, x = np.mgrid[:height, :width]
            wave = np.sin((x if c % 2 else y) * (0.3 + 0.25 * (c // 2)) + generator.uniform(0, 6))
            colours = generator.uniform(0, 255, (2, 3))
            pixels = colours[0] + (wave[..., None] > 0) * (colours[1] - colours[0])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{c}" / f"{i:03d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> pathlib.Path:
    """72 training and 24 validation images of 4 classes, as train/ and val/."""
    root = tmp_path_factory.mktemp("images")
    make_images(root / "train", 4, 18)
    make_images(root / "val", 4, 6, seed=1)
    return root


@pytest.fixture(scope="session")
def shards(image_folder, tmp_path_factory) -> pathlib.Path:
    """image_folder as .beton shards, three of them for training."""
    from fasttrain.dataprep.convert import main

    out = tmp_path_factory.mktemp("converted") / "shards"
    assert main([str(image_folder), str(out), "--format", "ffcv", "--shard-size", "30", "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="session")
def tar_shards(image_folder, tmp_path_factory) -> pathlib.Path:
    """image_folder as WebDataset tars with their index files; the samples of `shards` in the same order."""
    from fasttrain.dataprep.convert import main

    out = tmp_path_factory.mktemp("tars") / "shards"
    assert main([str(image_folder), str(out), "--format", "webdataset", "--shard-size", "30", "--workers", "1"]) == 0
    return out


@pytest.fixture
def run_command(tmp_path):
    """Run one of the project's commands as a person would, from another folder; returns the finished process."""

    def run(*words: object, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / str(words[0])), *map(str, words[1:])]
        environment = {**os.environ, "PYTHONPATH": ""}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment, **options
        )

    return run


def one_line(process: subprocess.CompletedProcess) -> str:
    """The single error line of a failed command: asserts that there is no traceback and nothing else."""
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert "Traceback" not in process.stderr, process.stderr
    errors = [line for line in lines if ": error: " in line]
    assert len(errors) == 1, process.stderr
    return errors[0]


def compiled_for_hopper(kernels: str, cache: pathlib.Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Registers, bytes of stack and of shared memory by kernel and label, of one folder's Triton kernels on sm_90."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/compile_hopper.py", kernels], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)}, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name, label): tuple(taken) for name, label, *taken in lines}
