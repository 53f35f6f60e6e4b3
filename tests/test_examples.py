"""The examples run as they are, and go on exactly where they were stopped."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from support.commands import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL = ("--size", 16, "--batch-size", 24)


def run(cwd: pathlib.Path, name: str, *words: object) -> str:
    """What an example writes, run from another folder in a process of its own."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path: pathlib.Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 100
    assert any(line.startswith(f"python examples/{path.name} --data shards") for line in lines[:8])


def test_the_plain_loop_goes_on_to_the_same_weights(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = "plain_loop.py", "--data", shards, *SMALL
    assert "epoch 1 step 5 loss" in run(tmp_path, *words, "--checkpoint", "whole.pt", "--max-steps", 5)
    run(tmp_path, *words, "--checkpoint", "parts.pt", "--max-steps", 2)
    assert "epoch 1 step 5 loss" in run(tmp_path, *words, "--checkpoint", "parts.pt", "--max-steps", 5)
    whole, parts = (torch.load(tmp_path / name) for name in ("whole.pt", "parts.pt"))
    assert whole["loader"] == parts["loader"]
    assert all(torch.equal(value, parts["network"][name]) for name, value in whole["network"].items())


def test_own_losses_train(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = "--data", shards, *SMALL, "--queue-size", 96, "--max-steps", 4
    last = run(tmp_path, "own_method_losses.py", *words).split()
    assert last[:4] == ["epoch", "1", "step", "4"]
    assert 0 < float(last[5]) < 10
    assert 0 < float(last[7]) < 2


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lightning"), reason="lightning is not installed")
def test_lightning_goes_on_to_the_same_weights(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = "lightning_module.py", "--data", shards, *SMALL
    run(tmp_path, *words, "--folder", "whole", "--max-steps", 5)
    run(tmp_path, *words, "--folder", "parts", "--max-steps", 2)
    run(tmp_path, *words, "--folder", "parts", "--max-steps", 5, "--resume")
    whole, parts = (torch.load(tmp_path / name / "last.ckpt", weights_only=False) for name in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 5
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())
