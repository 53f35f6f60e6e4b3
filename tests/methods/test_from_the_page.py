"""docs/adding-a-method.md can be followed: its method trains, on one rank and on several."""

import pathlib
import re

import pytest
import torch
from support.commands import ROOT
from support.forks import RunCommand, on_ranks, succeed

from fasttrain.engine.ranks import Ranks
from fasttrain.run.metrics import read_metrics

PAGE = (ROOT / "docs/adding-a-method.md").read_text()
MOST_LINES = 40  # of code


@pytest.fixture
def sphere(tmp_path: pathlib.Path) -> pathlib.Path:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "sphere.py"
    path.write_text(code)
    return path


def test_the_page_s_method_is_short(sphere: pathlib.Path) -> None:
    lines = [line for line in sphere.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES


def test_the_page_s_method_trains(
    sphere: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path, run_command: RunCommand
) -> None:
    words = ["--method", "sphere:SphereOptions", "--preset", "demo", "--size", "16", "--batch-size", "16"]
    steps = ["--uniform-weight", "0.5", "--max-steps", "4", "--log-every", "2"]
    done = run_command("fasttrain/train.py", "--data", shards, "--run", tmp_path / "run", *words, *steps)
    assert done.returncode == 0, done.stderr
    last = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert last["step"] == 4
    assert last["loss"] == pytest.approx(last["align"] + 0.5 * last["uniform"], abs=1e-5)
    shown = run_command("fasttrain/train.py", "--method", "sphere:SphereOptions", "--help").stdout
    assert "--uniform-weight" in shown
    assert "2005.10242" in shown
    refused = run_command("fasttrain/train.py", "--data", shards, *words, "--accumulate", "2")
    assert refused.returncode == 2
    assert "compares the images of a batch" in refused.stderr


def _uniformity(folder: pathlib.Path) -> None:
    import sys

    sys.path.insert(0, str(folder))
    from sphere import uniformity

    ranks = Ranks("cpu")
    count = 8 // ranks.world_size
    rows = torch.load(folder / "rows.pt")[ranks.rank * count :][:count].requires_grad_()
    value = uniformity(rows)
    value.backward()
    torch.save((value.detach(), rows.grad / ranks.world_size), folder / f"rank{ranks.rank}.pt")
    ranks.close()


def test_the_page_s_loss_is_that_of_the_global_batch(sphere: pathlib.Path, tmp_path: pathlib.Path) -> None:
    torch.save(torch.nn.functional.normalize(torch.randn(8, 5), dim=1), tmp_path / "rows.pt")
    succeed(on_ranks(tmp_path, 1, _uniformity, tmp_path))
    value, gradient = torch.load(tmp_path / "rank0.pt")
    succeed(on_ranks(tmp_path, 2, _uniformity, tmp_path))
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert all(torch.allclose(part[0], value, atol=1e-6) for part in parts)
    assert torch.allclose(torch.cat([part[1] for part in parts]), gradient, atol=1e-6)
