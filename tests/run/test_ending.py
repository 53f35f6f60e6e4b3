"""How a run ended is kept, whatever ended it, and what is known of one that could not say."""

import errno
import os
import pathlib
import signal

import pytest
from support.commands import one_line_of
from support.launch import ENDLESS, TINY, command, started, train, train_on_ranks, wait_for_step

from fasttrain.config import parse_config
from fasttrain.jobs import train as job
from fasttrain.methods.moco import MoCo
from fasttrain.run import ending
from fasttrain.run.ending import FILE, Ending, ending_of
from fasttrain.run.folder import LOCK, read_record
from fasttrain.system import lock
from fasttrain.system.errors import RunError
from fasttrain.system.lock import lock as take


def state(run: pathlib.Path) -> tuple[str, str, int]:
    found = ending_of(run, read_record(run / "config.json"))
    return found.state, found.line, found.step


def raising(error: BaseException) -> object:
    def replaced(*_arguments: object, **_named: object) -> None:
        raise error

    return replaced


def test_a_run_that_is_done_says_so_also_after_it_was_started_again(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--max-steps", 3) == 0
    assert state(run) == ("done", "", 3)
    assert train(shards, run) == 0
    assert state(run) == ("done", "", 16)
    assert read_record(run / "config.json")["steps"] == {"last": 16, "per_epoch": 4}


def test_a_run_is_running_until_it_stops_or_is_killed(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    with started(command(shards, run, *ENDLESS), tmp_path / "log") as process:
        before = wait_for_step(run, 4, process)
        assert state(run)[0] == "running"
        process.terminate()
        assert process.wait(180) == 128 + signal.SIGTERM
    assert state(run)[:2] == ("stopped", "by SIGTERM")
    last = state(run)[2]
    assert last >= before
    with started(command(shards, run, *ENDLESS), tmp_path / "log") as process:
        wait_for_step(run, last + 4, process)
        process.kill()
        process.wait()
    assert state(run)[:2] == ("killed", "nobody trains it, and it has not said how it ended")


def test_on_two_ranks_it_is_kept_once_for_both(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    done = train_on_ranks(tmp_path, 2, shards, run, "--max-steps", 3)
    assert [process.returncode for process in done] == [0, 0], done
    assert state(run) == ("done", "", 3)
    done = train_on_ranks(tmp_path, 2, shards, run, "--epochs", 99, "--fresh", "--method", "moco", "--lr", "1e30")
    assert all(process.returncode for process in done)
    assert state(run)[0] == "failed"
    assert state(run)[1].startswith("the loss or its gradients were not finite")


def test_an_error_of_ours_is_kept_as_it_was_told_until_the_run_goes_on(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--max-steps", 1) == 0
    with monkeypatch.context() as patch:
        patch.setattr(job, "save_checkpoint", raising(RunError("checkpoint x can't be written:\ndisk full")))
        assert train(shards, run, "--max-steps", 3) == 1
    assert "x can't be written: disk full" in one_line_of(capsys.readouterr().err)
    assert state(run) == ("failed", "checkpoint x can't be written: disk full", 3)
    assert train(shards, run, "--max-steps", 3) == 0
    assert state(run) == ("done", "", 3)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("mat1 and mat2\nmore"), ("failed", "RuntimeError: mat1 and mat2", 0)),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), ("failed", "/x/y: disk full: No space left", 0)),
        (KeyboardInterrupt(), ("stopped", "by a second SIGINT, at once", 0)),
        (MemoryError(), ("failed", "MemoryError:", 0)),
    ],
)
def test_an_error_of_another_kind_is_kept_and_raised_all_the_same(
    error: BaseException, expected: tuple[str, str, int], shards: pathlib.Path, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(MoCo, "forward", raising(error))
    run = tmp_path / "run"
    with pytest.raises(type(error)) as caught:
        job.train(parse_config(["--data", str(shards), "--run", str(run), "--method", "moco", *TINY]))
    assert caught.value is error
    assert state(run) == expected


def test_a_disk_too_full_for_the_ending_does_not_hide_the_error(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ending, "write_json", raising(OSError(errno.ENOSPC, "No space left on device")))
    with monkeypatch.context() as patch:
        patch.setattr(job, "save_checkpoint", raising(RunError("the first error")))
        assert train(shards, tmp_path / "run", "--max-steps", 3) == 1
    told = capsys.readouterr().err
    assert "the first error" in one_line_of(told)
    assert f"warning: {tmp_path / 'run' / FILE} can't be written: disk full: No space left on device" in told
    assert state(tmp_path / "run")[0] == "killed"
    assert train(shards, tmp_path / "run", "--max-steps", 3) == 0  # nor does it end what went well


def test_a_command_that_is_refused_changes_nothing_of_how_the_run_ended(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--max-steps", 3) == 0
    before = (run / FILE).read_bytes()
    assert train(shards, run, "--dim", 32) == 2
    (checkpoint,) = (run / "checkpoints").iterdir()
    checkpoint.write_bytes(b"none")  # so that it fails once the folder is claimed
    assert train(shards, run, "--max-steps", 3) == 1
    assert (run / FILE).read_bytes() == before


def test_a_command_that_is_refused_says_nothing_of_how_a_killed_run_ended(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would say that the run had failed, at step 0."""
    run = tmp_path / "run"
    assert train(shards, run, "--max-steps", 3) == 0
    (run / FILE).unlink()
    monkeypatch.setattr(job, "resume", raising(RunError("can't be resumed")))
    assert train(shards, run, "--max-steps", 3) == 1
    assert state(run)[0] == "killed"


def test_a_run_that_never_began_says_why(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "resume", raising(RunError("can't be resumed")))
    assert train(shards, tmp_path / "run") == 1
    assert state(tmp_path / "run") == ("failed", "can't be resumed", 0)


def test_a_run_by_a_version_that_kept_no_ending_is_not_guessed_at(tmp_path: pathlib.Path) -> None:
    assert ending_of(tmp_path, {"config": {}}).state == "unknown"
    assert ending_of(tmp_path, {"config": {}, "steps": {}}).state == "killed"
    with take(tmp_path / LOCK, "taken"):
        assert ending_of(tmp_path, {"config": {}}) == Ending("running")


def test_where_there_are_no_locks_nothing_is_said_of_who_holds_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK).touch()
    monkeypatch.setattr(lock.fcntl, "flock", raising(OSError(errno.ENOLCK, "No locks available")))
    found = ending_of(tmp_path, {"config": {}, "steps": {}})
    assert found == Ending("unknown", "whether it runs can't be told here: No locks available")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", '{"state": "done"', '{"state": 7}', '{"state": "sleeping"}', '{"state": "done", "step": "x"}',
     '{"state": "done", "more": 1}', '{"state": "done", "step": -1}', '{"state": "done", "step": 1' + "0" * 400 + "}",
     "[" * 100_000, " " * 100_000],
)  # fmt: skip
def test_a_damaged_file_is_said_to_be_damaged(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / FILE).write_text(content)
    found = ending_of(tmp_path, {"config": {}, "steps": {}})
    assert found.state == "unknown"
    assert str(tmp_path / FILE) in found.line


def test_a_fifo_in_its_place_is_not_waited_for(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / FILE)
    assert ending_of(tmp_path, {"config": {}, "steps": {}}).state == "unknown"
