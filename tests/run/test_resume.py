"""Going on with a run: all ranks from the same checkpoint or none, what does not fit, what is set aside, --fresh."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from support.commands import one_line, one_line_of
from support.forks import RunCommand, on_ranks, succeed
from support.launch import TINY, equal, final_state, launcher, started, train, train_on_ranks, wait_for_step

from fasttrain.config import make_config
from fasttrain.jobs import train as job
from fasttrain.run import folder, resume
from fasttrain.run.checkpoint import CheckpointError, save_checkpoint, saved_checkpoints
from fasttrain.run.folder import prepare
from fasttrain.run.metrics import read_metrics
from fasttrain.system.durable import temporary_path
from fasttrain.system.errors import UserError
from fasttrain.system.options import Settings
from fasttrain.train import main

EVERY_4 = ["--checkpoint-every", 4]


def names(run: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def stopped(shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Stopped at step 9, with checkpoints of 4, 8 and 9."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert train(shards, run, "--max-steps", 9, *EVERY_4) == 0
    return run


@pytest.fixture
def run(stopped: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(stopped, tmp_path / "run")


def change_byte(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def test_a_damaged_one_is_set_aside_and_pushes_no_good_one_out(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_byte(run / "checkpoints/step-000000009.pt")
    assert train(shards, run, "--keep-last", 1, "--max-steps", 9, "--checkpoint-every", 100) == 0
    errors = capsys.readouterr().err
    assert "step-000000009.pt can't be read: its content has changed since it was written" in errors
    assert f"continuing {run} from step 8" in errors
    assert names(run) == ["step-000000009.pt", "step-000000009.pt.unreadable"]


def test_the_last_good_checkpoint_is_one_that_can_be_read(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    change_byte(run / "checkpoints/step-000000009.pt")
    monkeypatch.setattr(torch, "save", full)
    assert train(shards, run) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"No space left on device; the last good one: {run / 'checkpoints/step-000000008.pt'}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["config"].update(dim=8), "a checkpoint of other settings: --dim was 8, now 16"),
        (lambda state: state.update(data="other"), "a checkpoint of a run begun with other images"),
        (lambda state: state.pop("method"), "does not fit these networks"),
        (lambda state: state.pop("config"), "a checkpoint of other settings"),
        (lambda state: state.pop("optimizer"), "does not fit these networks"),
        (lambda state: state["method"].update({key: torch.zeros(3) for key in state["method"]}), "does not fit"),
    ],
)
def test_one_that_does_not_fit_is_one_line_which_offers_the_one_before(
    run: pathlib.Path,
    shards: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    newest = saved_checkpoints(run / "checkpoints")[0]
    state = torch.load(newest, weights_only=True)
    change(state)
    save_checkpoint(run / "checkpoints", state, 0)
    assert train(shards, run) in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert str(newest) in line
    assert "move it away and the same command continues from step 8, or use --fresh" in line
    newest.unlink()
    assert train(shards, run, "--max-steps", 9) == 0
    assert f"continuing {run} from step 8" in capsys.readouterr().err


def test_one_of_an_earlier_version_is_refused_in_one_line(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = saved_checkpoints(run / "checkpoints")[0]
    state = torch.load(newest, weights_only=True)
    save_checkpoint(run / "checkpoints", {**state, "format": 1}, 0)
    assert train(shards, run) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{newest} was written by another version of fasttrain (format 1, this one reads 2)" in line
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "format": None}))
    assert train(shards, run) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is of a run by an earlier version of fasttrain" in line


def test_one_that_does_not_fit_is_one_line_of_the_evaluation_too(run: pathlib.Path, run_command: RunCommand) -> None:
    newest = saved_checkpoints(run / "checkpoints")[0]
    state = torch.load(newest, weights_only=True)
    state["method"].update({key: torch.zeros(3) for key in state["method"]})
    save_checkpoint(run / "checkpoints", state, 0)
    process = run_command("fasttrain/evaluate.py", run, "--knn")
    assert process.returncode == 2
    assert f"{newest} does not fit the networks of its run's config.json" in one_line(process)


def test_one_that_does_not_fit_with_none_before_it_offers_to_start_over(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in saved_checkpoints(run / "checkpoints")[1:]:
        path.unlink()
    state = torch.load(saved_checkpoints(run / "checkpoints")[0], weights_only=True)
    save_checkpoint(run / "checkpoints", {**state, "data": "other"}, 0)
    assert train(shards, run) == 2
    assert "use another --run, or --fresh to start over" in capsys.readouterr().err


def _see_another(checkpoint: str, words: list[str]) -> int:
    """Train; the second rank reads another checkpoint (of that path, from the run folder) in place of every one."""
    if os.environ["RANK"] == "1":
        real = resume.load_checkpoint
        resume.load_checkpoint = lambda path: real(path.parents[1] / checkpoint)
    return main(words)


@pytest.mark.parametrize(
    ("seen", "more", "message"),
    [
        ("elsewhere/step-000000009.pt", [], "process 1: checkpoint"),
        ("checkpoints/step-000000004.pt", [], "is another file than the first process reads; all must see the same"),
        ("checkpoints/step-000000009.pt", ["--temperature", "0.3"], "other settings: --temperature was 0.2, now 0.3"),
    ],
)
def test_ranks_go_on_from_the_same_checkpoint_or_all_end(
    run: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path, seen: str, more: list[str], message: str
) -> None:
    words = ["--data", str(shards), "--run", str(run), *TINY, *more]
    ended = on_ranks(tmp_path, 2, _see_another, seen, words)
    assert all(rank.returncode for rank in ended), ended
    errors = [line for rank in ended for line in rank.stderr.splitlines() if ": error: " in line]
    assert len(errors) == 1, ended
    assert message in errors[0]
    assert names(run) == [f"step-{step:09d}.pt" for step in (4, 8, 9)]
    assert final_state(run)["step"] == 9


@pytest.mark.parametrize("fault", ["a run inside its images", "metrics that are no file"])
def test_what_the_first_rank_alone_finds_ends_all_in_one_line(
    run: pathlib.Path, shards: pathlib.Path, image_folder: pathlib.Path, tmp_path: pathlib.Path, fault: str
) -> None:
    words = ["--data", str(shards), "--run", str(run), *TINY]
    message, status = f"{run / 'metrics.jsonl'}: not a regular file", 1
    if fault == "a run inside its images":
        words[:4] = ["--data", str(image_folder), "--run", str(image_folder / "run")]
        message, status = f"lies inside the folder of images {image_folder}", 2
    else:
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").mkdir()
    ended = on_ranks(tmp_path, 2, main, words)
    assert [rank.returncode for rank in ended] == [status, status], ended
    assert message in one_line_of("".join(rank.stderr for rank in ended))


def test_a_signal_to_one_of_two_ranks_stops_both_and_they_go_on_together(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Not to the launcher, which would hand it on to both."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["--epochs", 100, "--checkpoint-every", 4, "--knn-every", 50]
    with started(launcher(shards, run, *words), log, PET_NPROC_PER_NODE=2) as job:
        wait_for_step(run, 4, job)
        ranks = [child for child in psutil.Process(job.pid).children() if "train.py" in " ".join(child.cmdline())]
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").terminate()
        assert job.wait(180) == 1
    step = final_state(run)["step"]
    assert f"stopped by SIGTERM at step {step};" in log.read_text()
    assert "lost another process" not in log.read_text()
    whole = tmp_path / "whole"
    for each in (run, whole):
        succeed(train_on_ranks(tmp_path, 2, shards, each, *words, "--max-steps", step + 3))
    assert equal(final_state(whole), final_state(run)) == []


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_fresh_is_honoured_once_in_a_job(
    run: pathlib.Path, shards: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert train(shards, run, "--fresh", "--max-steps", 10) == 0
    monkeypatch.setenv(name, "once")
    assert train(shards, run, "--fresh", "--max-steps", 10) == 0
    assert not run.with_name("run.previous-1").exists()
    monkeypatch.setenv(name, "0")
    assert train(shards, run, "--fresh", "--max-steps", 2) == 0
    assert final_state(run)["step"] == 2
    assert final_state(run.with_name("run.previous-1"))["step"] == 10


def test_fresh_is_honoured_once_in_a_job_that_a_machine_joins(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts its processes again then, and does not count it; only the job's name is the same."""
    settings = Settings.of(make_config(data="x"))
    for name, moved in (("a", 1), ("a", 1), ("b", 2), ("none", 3), ("none", 4)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        prepare(run, settings, True).close()
        assert len(list(run.parent.glob("run.previous-*"))) == moved, name


@pytest.mark.parametrize(
    ("begun", "now", "goes_on"),
    [
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "b", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({}, {"TORCHELASTIC_RUN_ID": "b", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "17"}, {"SLURM_JOB_ID": "18", "SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "17"}, {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "17"}, {"SLURM_JOB_ID": "17"}, False),  # typed twice in one allocation
        # recipes/slurm.sbatch: torchrun's name has the count in it
        (
            {"SLURM_JOB_ID": "17", "TORCHELASTIC_RUN_ID": "17.0"},
            {"SLURM_JOB_ID": "17", "TORCHELASTIC_RUN_ID": "17.1", "SLURM_RESTART_COUNT": "1"},
            True,
        ),
        (
            {"SLURM_JOB_ID": "17", "TORCHELASTIC_RUN_ID": "17.0"},
            {"SLURM_JOB_ID": "18", "TORCHELASTIC_RUN_ID": "18.1", "SLURM_RESTART_COUNT": "1"},
            False,
        ),
        (
            {"SLURM_JOB_ID": "17", "TORCHELASTIC_RUN_ID": "17.0"},
            {"SLURM_JOB_ID": "17", "TORCHELASTIC_RUN_ID": "17.0", "TORCHELASTIC_RESTART_COUNT": "1"},
            True,
        ),
    ],
)
def test_a_start_that_is_counted_goes_on_only_in_a_folder_of_its_own_job(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, begun: dict[str, str], now: dict[str, str], goes_on: bool
) -> None:
    """Its first start may have died before it claimed the folder, which is then another job's."""
    settings = Settings.of(make_config(data="x"))
    for variables in (begun, now):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            prepare(tmp_path / "run", settings, True).close()
    assert (tmp_path / "run.previous-1").exists() != goes_on


def _link_to_nowhere(checkpoints: pathlib.Path) -> None:
    checkpoints.rename(checkpoints.with_name("elsewhere"))
    checkpoints.symlink_to(checkpoints.with_name("missing"))


def _a_file(checkpoints: pathlib.Path) -> None:
    checkpoints.rename(checkpoints.with_name("elsewhere"))
    checkpoints.touch()


def _empty(checkpoints: pathlib.Path) -> None:  # as the place of a mount that is not there
    checkpoints.rename(checkpoints.with_name("elsewhere"))
    checkpoints.mkdir()


@pytest.mark.parametrize(
    ("hide", "message"),
    [
        (_link_to_nowhere, "could not be looked for: No such file or directory"),
        (_a_file, "could not be looked for: Not a directory"),
        (_empty, "are gone: none is in"),
        (lambda checkpoints: checkpoints.rename(checkpoints.with_name("elsewhere")), "are gone: none is in"),
    ],
    ids=["link", "file", "empty", "moved"],
)
def test_a_run_whose_checkpoints_are_out_of_sight_does_not_start_over(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str],
    hide: Callable[[pathlib.Path], None], message: str,
) -> None:  # fmt: skip
    (run / "ending.json").unlink()  # killed
    hide(run / "checkpoints")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert train(shards, run, "--max-steps", 9) == 1
    assert message in one_line_of(capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_that_ended_before_its_first_checkpoint_starts_over_and_says_so(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_arguments: object) -> None:
        raise CheckpointError("disk full")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(job, "save_checkpoint", full)
        assert train(shards, run, "--max-steps", 2) == 1
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")] == [2]
    capsys.readouterr()
    assert train(shards, run, "--max-steps", 2) == 0
    assert f"{run} has no checkpoint yet: training from the start" in capsys.readouterr().err
    assert final_state(run)["step"] == 2


@pytest.mark.parametrize("fresh", [False, True])
def test_who_gets_the_lock_of_a_folder_that_another_has_moved_aside_trains_in_the_new_one_or_gives_up(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    """Started at once, both open the lock; one has moved it away with the folder before the other locks it."""
    settings, real = Settings.of(make_config(data="x")), fcntl.flock
    monkeypatch.setattr(folder, "PATIENCE_SECONDS", 0.0)

    def meanwhile(other: Callable[[], object]) -> None:
        def flock(descriptor: int, operation: int) -> None:
            monkeypatch.setattr(fcntl, "flock", real)
            other()
            real(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", flock)

    def moved() -> list[str]:
        return sorted(path.name for path in run.parent.glob("run.*"))

    with contextlib.ExitStack() as stack:
        meanwhile(lambda: stack.enter_context(prepare(run, settings, True)))
        with pytest.raises(UserError, match="another process is training in"):
            prepare(run, settings, fresh)
    assert moved() == ["run.previous-1"]
    meanwhile(lambda: run.rename(run.with_name("run.elsewhere")))  # and ends before it makes a new one
    with prepare(run, settings, fresh), pytest.raises(UserError, match="another process is training in"):
        prepare(run, settings, fresh)
    assert moved() == ["run.elsewhere", "run.previous-1"]


def test_fresh_leaves_what_the_same_job_has_begun_while_it_waited_for_the_lock(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's first start, told to stop, claims the folder only just before its second looks."""
    settings, real = Settings.of(make_config(data="x")), fcntl.flock
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        prepare(run, settings, True).close()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    prepare(run, settings, True).close()
    assert [path.name for path in run.parent.glob("run.*")] == ["run.previous-1"]


def test_a_lock_that_is_a_link_to_nowhere_is_one_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "missing/lock")
    with pytest.raises(FileNotFoundError, match="lock"):
        prepare(tmp_path, Settings.of(make_config(data="x")), False)


def test_a_run_that_ended_before_it_had_a_config_can_begin(tmp_path: pathlib.Path, shards: pathlib.Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").touch()
    temporary_path(run / "config.json").write_text('{"config": {')
    assert train(shards, run, "--max-steps", 1) == 0
    assert json.loads((run / "config.json").read_text())["config"]["dim"] == 16
    assert not temporary_path(run / "config.json").exists()
