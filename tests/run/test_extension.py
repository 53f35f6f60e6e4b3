"""A finished run that is extended: the same as if it had been so from the start, and refused where it can't be."""

import json
import pathlib
import shutil

import pytest
import torch
from support.commands import one_line_of
from support.launch import equal, final_state, train

from fasttrain.config import load_config
from fasttrain.run.checkpoint import saved_checkpoints
from fasttrain.run.metrics import read_metrics

MOCO = ["--method", "moco", "--ema-end", 1.0, "--warmup-epochs", 1, "--epochs", 2]  # 4 steps an epoch
EXTENDED = [*MOCO, "--extend", 1]


@pytest.fixture(scope="module")
def finished(shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(shards, run, *MOCO) == 0
    return run


@pytest.fixture
def run(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_extended_later_and_killed_meanwhile_is_the_run_extended_from_the_start(
    finished: pathlib.Path, run: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train(shards, tmp_path / "whole", *EXTENDED) == 0
    nothing = "whole has nothing to extend: training from the start"
    assert nothing in " ".join(capsys.readouterr().err.split())
    assert train(shards, run, *EXTENDED, "--max-steps", 10, "--checkpoint-every", 1) == 0
    saved_checkpoints(run / "checkpoints")[0].unlink()  # as if it had ended before this was written
    assert train(shards, run, *EXTENDED) == 0
    assert "nothing to extend" not in capsys.readouterr().err
    assert final_state(run)["step"] == 12
    assert equal(final_state(tmp_path / "whole"), final_state(run)) == []
    keys = "key_projector.0.weight"  # frozen, if the momentum's cosine stayed at its end
    assert not torch.equal(final_state(finished)["method"][keys], final_state(run)["method"][keys])
    lr = {entry["step"]: entry["lr"] for entry in read_metrics(run / "metrics.jsonl")}
    assert list(lr) == [2, 4, 6, 8, 9, 10, 12]  # one more where it was stopped
    assert lr[9] > lr[8] > 0  # it begins anew
    assert lr[12] < lr[10] < lr[9]


def test_the_same_command_does_not_extend_again_and_another_extension_goes_on(
    run: pathlib.Path, shards: pathlib.Path
) -> None:
    for _ in range(2):
        assert train(shards, run, *EXTENDED) == 0
        assert final_state(run)["step"] == 12
    assert train(shards, run, *EXTENDED, 2) == 0
    assert final_state(run)["step"] == 20
    assert load_config(run).run.extend == (1, 2)
    history = json.loads((run / "config.json").read_text())["extended"]
    assert [(entry["step"], entry["extend"]) for entry in history] == [(8, [1]), (12, [2])]


def test_less_than_it_was_extended_by_is_refused_with_what_to_type(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, run, *EXTENDED, "--max-steps", 9) == 0
    for typed, now in (((), "[]"), (("--extend", 2), "[2]")):
        capsys.readouterr()
        assert train(shards, run, *MOCO, *typed) == 2
        line = one_line_of(capsys.readouterr().err)
        assert f"--extend was [1], now {now}: type --extend 1 (more may follow)" in line
    assert final_state(run)["step"] == 9


def test_an_extension_without_a_checkpoint_may_have_been_a_slip(run: pathlib.Path, shards: pathlib.Path) -> None:
    def extended() -> tuple:
        config = json.loads((run / "config.json").read_text())
        return config["config"]["extend"], [(entry["step"], entry["extend"]) for entry in config.get("extended", [])]

    for typed, recorded in ((["--extend", 1000], ([1000], [(8, [1000])])), ([], ([], []))):
        assert train(shards, run, *MOCO, *typed, "--max-steps", 8) == 0  # as if it were stopped before a step
        assert extended() == recorded
    assert train(shards, run, *MOCO, "--extend", 1000, "--max-steps", 8) == 0
    assert train(shards, run, *EXTENDED) == 0
    assert extended() == ([1], [(8, [1])])
    assert final_state(run)["step"] == 12


def test_a_run_that_is_not_finished_is_not_extended(
    run: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, run, *EXTENDED, "--max-steps", 9) == 0
    assert train(shards, tmp_path / "begun", *MOCO, "--max-steps", 3) == 0
    for folder, typed, done, first in (
        (run, [*EXTENDED, 1], "9 of 12", "with --extend 1"),
        (tmp_path / "begun", EXTENDED, "3 of 8", "without --extend"),
    ):
        config, metrics = (folder / "config.json").read_bytes(), (folder / "metrics.jsonl").read_bytes()
        capsys.readouterr()
        assert train(shards, folder, *typed) == 2
        line = one_line_of(capsys.readouterr().err)
        assert f"{folder} has done {done} steps" in line
        assert line.endswith(f"finish it first, by the same command {first}")
        assert (folder / "config.json").read_bytes() == config
        assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_other_settings_stay_bound_when_a_run_is_extended(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, run, *EXTENDED, "--temperature", 0.3) == 2
    assert "--temperature was 0.2, now 0.3; use another" in one_line_of(capsys.readouterr().err)
    assert train(shards, run, *MOCO, "--extend", 0) == 2
    assert "--extend must be above 0" in capsys.readouterr().err


def test_an_extension_whose_checkpoints_are_lost_goes_on_from_any_before(
    run: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """It is a function of the step, so the run need not be finished again without it."""
    begun = tmp_path / "begun"
    assert train(shards, begun, *MOCO, "--max-steps", 5) == 0
    assert train(shards, run, *EXTENDED, "--max-steps", 9) == 0
    for path in saved_checkpoints(run / "checkpoints"):
        path.unlink()
    shutil.copy(saved_checkpoints(begun / "checkpoints")[0], run / "checkpoints")
    assert train(shards, run, *EXTENDED) == 0
    assert final_state(run)["step"] == 12
