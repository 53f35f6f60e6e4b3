"""`train` as other people's programs call it: it returns the run, and leaves their process as it was."""

import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.forks import finished, on_ranks, succeed
from support.launch import TINY, equal, final_state

from fasttrain.config import TrainConfig, make_config
from fasttrain.engine.step import TrainStep
from fasttrain.jobs.train import Finished, train
from fasttrain.run.checkpoint import saved_checkpoints
from fasttrain.system.errors import UserError
from fasttrain.train import main

STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP
KEPT = "augment"  # threads of that kernel, which waits with them for its next call, as torch does with its own
SECONDS = 30.0  # in which threads that were told to end have done so


def tiny(data: pathlib.Path, run: object, **values: Any) -> TrainConfig:
    given = {"arch": "small", "size": 16, "batch_size": 16, "queue_size": 64, "dim": 16, "epochs": 2, "max_steps": 3}
    return make_config("moco", **{"data": data, "run": run, "lr": 0.1, **given, **values})


def state() -> dict[str, Any]:
    """What a process has that training changes while it lasts."""
    return {
        "handlers": [signal.getsignal(number) for number in STOPS],
        "cores": os.sched_getaffinity(0),
        "torch's threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        "group": torch.distributed.is_initialized(),
    }


def files() -> set[str]:
    return {path for fd in os.listdir("/proc/self/fd") if (path := _target(fd)).startswith("/")}


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


@pytest.fixture
def as_before() -> Iterator[None]:
    """Fails a test that leaves more behind than it found, threads and files of a run included."""
    number = torch.get_num_threads()
    torch.set_num_threads(number + 2)  # not what training takes
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    before, threads = state(), set(threading.enumerate())
    yield
    assert state() == before
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(number)
    deadline = time.monotonic() + SECONDS
    while left := {thread for thread in set(threading.enumerate()) - threads if not thread.name.startswith(KEPT)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def at_step(monkeypatch: pytest.MonkeyPatch, wanted: int, act: Any) -> None:
    """Have training call something after that step, before it is counted."""
    update = TrainStep.update

    def acting(self: TrainStep, step: int, *rates: Any) -> None:
        update(self, step, *rates)
        if step == wanted:
            act()

    monkeypatch.setattr(TrainStep, "update", acting)


def interrupt(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def test_trainings_in_one_process_leave_it_as_it_was(
    as_before: None, shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert train(tiny(shards, tmp_path / "a")) == Finished(tmp_path / "a", 3, 0)
    opened = files()
    assert train(tiny(shards, tmp_path / "b", loader="resident")) == Finished(tmp_path / "b", 3, 0)
    assert files() == opened
    assert not any(str(tmp_path) in path for path in opened)


def test_a_second_training_at_the_same_time_is_refused(
    as_before: None, shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would draw from one random state."""
    assert train(tiny(shards, tmp_path / "alone")).step == 3

    def second() -> None:
        with pytest.raises(UserError, match="training already"):
            train(tiny(shards, tmp_path / "second"))

    at_step(monkeypatch, 1, second)
    assert train(tiny(shards, tmp_path / "first")).step == 3
    assert not (tmp_path / "second").exists()
    assert equal(final_state(tmp_path / "alone"), final_state(tmp_path / "first")) == []


def test_a_run_without_a_name_is_where_it_says(
    as_before: None, shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, step, stopped = train(tiny(shards, ""))
    assert (run.parent, step, stopped) == (pathlib.Path("runs"), 3, 0)
    assert final_state(tmp_path / run)["step"] == step


def test_the_first_interrupt_ends_a_step_with_a_checkpoint(
    as_before: None, shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 1, interrupt)
    assert train(tiny(shards, tmp_path / "run")) == Finished(tmp_path / "run", 2, signal.SIGINT)
    assert final_state(tmp_path / "run")["step"] == 2
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_the_second_interrupt_is_python_s_own(
    as_before: None, shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 1, lambda: interrupt(2))
    with pytest.raises(KeyboardInterrupt):
        train(tiny(shards, tmp_path / "run"))
    assert not saved_checkpoints(tmp_path / "run/checkpoints")
    monkeypatch.undo()
    assert train(tiny(shards, tmp_path / "run")).step == 3


def _interrupted_twice(words: list[str]) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        at_step(monkeypatch, 1, lambda: interrupt(2))
        return main(words)


def test_the_second_interrupt_ends_a_command_at_once(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ["--data", str(shards), "--run", str(tmp_path / "run"), *TINY]
    assert finished(tmp_path, _interrupted_twice, words).returncode == -signal.SIGINT


def _twice(data: pathlib.Path, folder: pathlib.Path) -> None:
    """The first rank leaves the first training late, so that the other one is early for the second."""
    before = os.sched_getaffinity(0), torch.get_num_threads()
    leave = torch.distributed.destroy_process_group
    if os.environ["RANK"] == "0":
        torch.distributed.destroy_process_group = lambda: (time.sleep(2), leave())
    for name in "ab":
        assert train(tiny(data, folder / name)).step == 3
        assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
        assert not torch.distributed.is_initialized()


def test_ranks_train_twice_in_one_job(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    succeed(on_ranks(tmp_path, 2, _twice, shards, tmp_path))


def test_a_group_that_another_has_made_is_one_line(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="training makes its own"):
        train(tiny(shards, tmp_path / "run"))


def test_an_error_inside_closes_threads_files_and_the_lock(
    as_before: None, shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = files()
    at_step(monkeypatch, 1, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        train(tiny(shards, tmp_path / "run"))
    assert not {path for path in files() - opened if str(tmp_path) in path}
    monkeypatch.undo()
    assert train(tiny(shards, tmp_path / "run")).step == 3
    del error  # until here, it has kept the frames of the first one


def test_an_error_before_the_first_step_closes_them_too(
    as_before: None, shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    train(tiny(shards, tmp_path / "run"))
    with pytest.raises(UserError, match=r"has other settings: --lr was 0\.1, now 0\.2"):
        train(tiny(shards, tmp_path / "run", lr=0.2))
    assert train(tiny(shards, tmp_path / "run", max_steps=4)).step == 4


def test_another_thread_than_the_main_one_can_train(
    as_before: None, shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 0, lambda: found.append(signal.getsignal(signal.SIGINT)))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(train(tiny(shards, tmp_path / "run"))))
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT), Finished(tmp_path / "run", 3, 0)]


@pytest.mark.parametrize("wrong", [None, {}, "x", ["--data", "x"], TrainConfig])
def test_what_is_no_configuration_is_one_line(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"train\(\) takes a configuration, as make_config\(\) returns it, not "):
        train(wrong)


def test_a_configuration_without_images_is_one_line() -> None:
    with pytest.raises(UserError, match="--data is missing"):
        train(make_config("moco"))
