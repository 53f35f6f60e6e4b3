"""What goes wrong on machines: killed processes, power cuts, full disks, full memory, lost ranks."""

import errno
import os
import pathlib
import random
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import IO

import psutil
import pytest
import torch
from support.commands import one_line_of
from support.forks import finished, succeed, with_small_files
from support.launch import (
    ENDLESS,
    command,
    equal,
    final_state,
    launcher,
    started,
    train,
    train_on_ranks,
    wait_for_end,
    wait_for_step,
)

from fasttrain import evaluate
from fasttrain.config import make_config
from fasttrain.engine.optim import Rates
from fasttrain.engine.step import TrainStep
from fasttrain.jobs import evaluate as job
from fasttrain.methods.moco import MoCo
from fasttrain.methods.nnclr import NNCLR
from fasttrain.run import folder
from fasttrain.run.checkpoint import CheckpointError, keep_best, load_newest, save_checkpoint, saved_checkpoints
from fasttrain.run.metrics import MetricsFile, read_metrics
from fasttrain.system.cli import said
from fasttrain.system.durable import replace_file
from fasttrain.system.options import Settings
from fasttrain.train import main

STEPS = 16  # of launch.TINY


@pytest.fixture(scope="module")
def uninterrupted(shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(shards, run) == 0
    return run


def test_killed_twice_and_continued_is_bit_identical(
    uninterrupted: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """SIGKILL somewhere, perhaps in the middle of saving: weights, queue, optimizer and loader end the same."""
    run = tmp_path / "run"
    kills = sorted(random.sample(range(1, STEPS - 3), 2))
    for kill in kills:
        with started(command(shards, run, "--checkpoint-every", 1), tmp_path / "log") as process:
            wait_for_step(run, kill, process)
            process.kill()
    assert train(shards, run, "--checkpoint-every", 1) == 0
    assert equal(final_state(uninterrupted), final_state(run)) == [], f"killed after {kills}"
    steps = [entry["step"] for entry in read_metrics(run / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert set(range(2, STEPS + 1, 2)) <= set(steps)
    assert not list(run.glob("checkpoints/*.tmp"))


def _killed_in(at: int, words: list[str]) -> int:
    """Train, but die in the middle of a step."""
    update = TrainStep.update

    def step(self: TrainStep, number: int, rates: Rates) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        update(self, number, rates)

    TrainStep.update = step
    return main(words)


def test_killed_between_checkpoints_the_steps_since_are_done_again_to_the_bit(
    uninterrupted: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run, rare = tmp_path / "run", ["--checkpoint-every", 6]
    for kill, newest in ((11, 6), (9, 6), (15, 12)):
        job = finished(tmp_path, _killed_in, kill, command(shards, run, *rare)[2:])
        assert job.returncode == -signal.SIGKILL, job.stderr
        assert final_state(run)["step"] == newest
    assert train(shards, run, *rare) == 0
    assert equal(final_state(uninterrupted), final_state(run)) == []
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")] == list(range(2, STEPS + 1, 2))


class PowerCut(BaseException):
    """Ends a save where it stands."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What raises PowerCut and lets nothing be tidied up until monkeypatch.undo()."""

    def cut(*_arguments: object) -> None:
        monkeypatch.setattr(pathlib.Path, "unlink", lambda *_arguments, **_options: None)
        raise PowerCut

    return cut


@pytest.mark.parametrize("point", ["write", "fsync", "replace", "flush_folder"])
def test_power_cut_while_saving_leaves_a_whole_checkpoint(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, cut: Callable[..., None], point: str
) -> None:
    state = {"step": 1, "weights": torch.arange(5000.0)}
    save_checkpoint(tmp_path, state, 2)

    def half(_state: object, file: IO[bytes]) -> None:
        file.write(b"PK" * 700)
        cut()

    if point == "write":
        monkeypatch.setattr(torch, "save", half)
    elif point == "flush_folder":
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: cut() if stat.S_ISDIR(os.fstat(file).st_mode) else real(file))
    else:
        monkeypatch.setattr(os, point, cut)
    with pytest.raises(PowerCut):
        save_checkpoint(tmp_path, {**state, "step": 2}, 2)
    monkeypatch.undo()
    newest = load_newest(tmp_path).state
    assert newest["step"] == (2 if point == "flush_folder" else 1)
    assert bool(list(tmp_path.glob("*.tmp"))) == (point != "flush_folder")
    assert torch.equal(newest["weights"], state["weights"])
    save_checkpoint(tmp_path, {**state, "step": 3}, 2)
    assert not list(tmp_path.glob("*.tmp"))


def test_what_is_renamed_is_on_the_disk_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may carry out a rename before the writes, unless they are flushed before it."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *words, name=name, real=real: (calls.append(name), real(*words))[1])
    save_checkpoint(tmp_path, {"step": 1}, 2)
    assert calls == ["fsync", "replace", "fsync"]
    calls.clear()
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError(1, "no links")))
    keep_best(tmp_path, 1)
    assert calls == ["fsync", "replace", "fsync"]
    calls.clear()
    folder.prepare(tmp_path / "run", Settings.of(make_config(data="x")), False).close()
    assert calls == ["fsync", "replace", "fsync"]


def test_power_cut_while_old_metrics_are_removed_leaves_all_of_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, cut: Callable[..., None]
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 9)))

    for point in ("fsync", "replace"):
        monkeypatch.setattr(os, point, cut)
        with pytest.raises(PowerCut):
            MetricsFile(metrics, 5)
        monkeypatch.undo()
        assert [entry["step"] for entry in read_metrics(metrics)] == list(range(1, 9))
    MetricsFile(metrics, 5).close()
    assert [entry["step"] for entry in read_metrics(metrics)] == list(range(1, 6))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def small_disk(tmp_path: pathlib.Path, uninterrupted: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = saved_checkpoints(uninterrupted / "checkpoints")[0].stat().st_size * 3 // 2
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_full_disk_ends_with_one_line_and_the_last_checkpoint(
    small_disk: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    assert train(shards, run, "--max-steps", 2) == 0
    assert train(shards, run, "--checkpoint-every", 3) == 1
    error = one_line_of(capsys.readouterr().err)
    assert "can't be written" in error
    assert "step-000000002.pt" in error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000002.pt"]


def test_checkpoint_that_is_none_of_ours_is_named_and_the_one_before_is_taken(
    uninterrupted: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--max-steps", 5) == 0
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, run / "checkpoints/step-000000009.pt")
    assert train(shards, run) == 0
    errors = capsys.readouterr().err
    assert "step-000000009.pt can't be read: its end is missing, or this program did not write it" in errors
    assert f"continuing {run} from step 5" in errors
    assert equal(final_state(uninterrupted), final_state(run)) == []


def test_two_ranks_stop_when_one_is_killed_and_the_run_goes_on(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with started(launcher(shards, run, *ENDLESS), log, PET_NPROC_PER_NODE=2) as job:
        wait_for_step(run, 4, job)
        ranks = [child for child in psutil.Process(job.pid).children() if "train.py" in " ".join(child.cmdline())]
        assert len(ranks) == 2
        ranks[1].kill()
        assert job.wait(180) == 1
        wait_for_end(*(rank.pid for rank in ranks))
    text = log.read_text()
    assert text.count("lost another process of this job") == 1
    assert "Signal 9 (SIGKILL) received" in text  # torchrun's report of the rank that died
    step = final_state(run)["step"]
    succeed(train_on_ranks(tmp_path, 2, shards, run, *ENDLESS, "--max-steps", step + 2))
    assert final_state(run)["step"] == step + 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out of GPU memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "out of GPU memory",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "out of GPU memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "out of main memory",
        ),
        (MemoryError(), "out of main memory"),
    ],
)
def test_full_memory_is_one_line_that_says_what_to_lower(
    shards: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def loss(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(MoCo, "loss", loss)
    assert train(shards, tmp_path / "run", "--method", "moco") == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if ": error: " in line)
    assert message in line
    assert "lower --batch-size (now 16) or --size (now 16)" in line
    assert "--accumulate" in line


def test_full_memory_of_a_loss_over_the_batch_does_not_advise_what_it_refuses(
    shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*_arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(NNCLR, "loss", loss)
    assert train(shards, tmp_path / "run", "--method", "nnclr", "--warmup-epochs", 1) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if ": error: " in line)
    assert "try --checkpoint-activations" in line
    assert "--accumulate" not in line


@pytest.mark.parametrize(
    ("name", "error", "status"),
    [
        (
            "over_features",
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "out of main memory; lower --batch-size",
        ),
        ("keep_evaluations", OSError(errno.ENOSPC, "No space left"), "disk full: No space left"),
    ],
)
def test_memory_and_disk_that_an_evaluation_finds_full_are_one_line(
    uninterrupted: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str,
    error: Exception, status: str,
) -> None:  # fmt: skip
    def fails(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(job, name, fails)
    assert evaluate.main([str(uninterrupted), "--knn"]) == 1
    told = capsys.readouterr()
    assert status in one_line_of(told.err)
    assert ("knn_top1" in told.out) == (name == "keep_evaluations")  # figures are told before they are kept


def test_an_error_of_our_own_is_not_explained_away(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*_arguments: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(MoCo, "loss", loss)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(shards, tmp_path / "run", "--method", "moco")


def test_a_signal_that_is_repeated_still_leaves_a_checkpoint(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Schedulers signal every process of a job, and torchrun passes the signal on as well."""
    run, log = tmp_path / "run", tmp_path / "log"
    with started(command(shards, run, *ENDLESS), log) as process:
        before = wait_for_step(run, 4, process)
        for _ in range(5):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.03)  # so that each is delivered
        assert process.wait(180) == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1" in log.read_text()
    assert final_state(run)["step"] >= before


def test_a_terminal_that_goes_away_leaves_the_run_and_sighup_ends_it_with_a_checkpoint(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run, (terminal, stderr) = tmp_path / "run", os.openpty()
    process = subprocess.Popen(command(shards, run, *ENDLESS), stderr=stderr, start_new_session=True)
    try:
        os.close(stderr)
        assert os.read(terminal, 1)  # the display has begun
        before = wait_for_step(run, 4, process)
        os.close(terminal)  # from now on, each write fails
        before = wait_for_step(run, before + 8, process)
        process.send_signal(signal.SIGHUP)
        assert process.wait(180) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    assert final_state(run)["step"] >= before
    assert "<svg" in (run / "report.html").read_text("utf-8")


def test_nohup_is_heeded(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    with started(["nohup", *command(shards, run, *ENDLESS)], tmp_path / "log") as process:
        before = wait_for_step(run, 4, process)
        process.send_signal(signal.SIGHUP)
        wait_for_step(run, before + 8, process)
        process.terminate()
        assert process.wait(180) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("num_bytes", "file"), [(5_000, "samples.png"), (20_000, "metrics.jsonl")])
def test_a_full_disk_names_the_file_that_found_it_full(
    shards: pathlib.Path, tmp_path: pathlib.Path, num_bytes: int, file: str
) -> None:
    """A limit on the size of files stands for it; no checkpoint is written before."""
    run = tmp_path / "run"
    words = command(shards, run, "--epochs", 100, "--log-every", 1)[2:]
    process = finished(tmp_path, with_small_files, num_bytes, main, words)
    assert process.returncode == 1
    assert f"{run / file}: File too large" in one_line_of(process.stderr)
    assert {path.name for path in run.iterdir()} <= {
        "config.json", "lock", "metrics.jsonl", "samples.png", "ending.json",
    }  # fmt: skip
    steps = [entry["step"] for entry in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_disk_that_is_full_is_called_so(small_disk: pathlib.Path) -> None:
    save_checkpoint(small_disk, {"step": 1}, 1)
    with pytest.raises(CheckpointError, match="can't be written: disk full: No space left on device; the last good"):
        save_checkpoint(small_disk, {"step": 2, "weights": torch.zeros(10_000_000)}, 1)
    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(small_disk / "report.html", lambda file: file.write(bytes(40_000_000)))
    assert said(caught.value) == f"{small_disk / 'report.html'}: disk full: No space left on device"
    assert [path.name for path in small_disk.iterdir()] == ["step-000000001.pt"]
