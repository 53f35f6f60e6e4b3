"""Two machines: network namespaces with addresses of their own, one torchrun in each, a run folder both share.

    make test-multinode

Needs root and iproute2; skips with the reason where the system does not let it make namespaces.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence

import psutil
import pytest
from support.launch import ENDLESS, final_state, launcher, started, train, wait_for_step

from fasttrain.run.metrics import read_metrics

PORT = 29400
SECONDS = 90  # in which a job whose other machine died has to end
NAMES = [f"fasttrain-{os.getpid()}-{side}" for side in "ab"]
ADDRESSES = ["10.213.77.1", "10.213.77.2"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@contextlib.contextmanager
def namespaces() -> Iterator[None]:
    """Two network namespaces joined by a cable."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            with contextlib.suppress(subprocess.CalledProcessError, OSError):
                ip("netns", "del", name)


@pytest.fixture(scope="module")
def cable() -> Iterator[None]:
    try:
        with namespaces():
            yield
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"no network namespaces here (they need root and iproute2): {reason.strip()}")


def side(
    place: int, shards: pathlib.Path, run: pathlib.Path, log: pathlib.Path, *more: object, **variables: object
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """One machine's torchrun (place 0 or 1), in its namespace, as a context: see launch.started."""
    words = ["ip", "netns", "exec", NAMES[place], *launcher(shards, run, "--device", "cpu", *more)]
    own = {"PET_LOCAL_ADDR": ADDRESSES[place], "GLOO_SOCKET_IFNAME": "eth0"}
    return started(words, log, **{"PET_NNODES": 2, "PET_NPROC_PER_NODE": 1, **own, **variables})


def static(place: int) -> dict[str, object]:
    return {"PET_MASTER_ADDR": ADDRESSES[0], "PET_MASTER_PORT": PORT, "PET_NODE_RANK": place}


def elastic(place: int) -> dict[str, object]:
    # torchrun finds out which machine is the endpoint by its host name; these two have the same one
    conf = f"is_host={int(place == 0)},join_timeout={SECONDS},last_call_timeout=2"
    return {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"{ADDRESSES[0]}:{PORT}", "PET_RDZV_CONF": conf}


def processes(place: int) -> list[int]:
    """Numbers of all processes of a machine."""
    words = ["ip", "netns", "pids", NAMES[place]]
    return list(map(int, subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.split()))


def ranks_end(place: int, within: float) -> bool:
    """Have all training processes of a machine ended after so many seconds? Its torchrun may have yet to notice."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        words = [psutil.Process(pid).cmdline() for pid in processes(place)]  # empty: nobody has fetched its status yet
        if words and not any(word and "torch.distributed.run" not in word for word in words):
            return True
        time.sleep(0.1)
    return False


def kill(job: subprocess.Popen[bytes]) -> None:
    """What a power cut does to a machine's processes: torchrun, and the rank in its own session, at once."""
    for pid in processes(1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert job.wait(SECONDS) == -signal.SIGKILL


def test_two_machines_train_to_the_end(cable: None, shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run, logs = tmp_path / "run", [tmp_path / "0", tmp_path / "1"]
    with side(0, shards, run, logs[0], **static(0)) as a, side(1, shards, run, logs[1], **static(1)) as b:
        assert a.wait(SECONDS) == 0, logs[0].read_text()
        assert b.wait(SECONDS) == 0, logs[1].read_text()
    assert final_state(run)["step"] == 16
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")] == list(range(2, 17, 2))


def test_a_job_ends_when_a_machine_dies_and_goes_on_from_its_checkpoint(
    cable: None, shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run, logs = tmp_path / "run", [tmp_path / "0", tmp_path / "1"]
    with side(0, shards, run, logs[0], *ENDLESS, **elastic(0)) as a:
        with side(1, shards, run, logs[1], *ENDLESS, **elastic(1)) as b:
            wait_for_step(run, 4, a, b)
            kill(b)
        assert a.wait(SECONDS) != 0
    assert "lost another process of this job" in logs[0].read_text()
    step = final_state(run)["step"]
    assert train(shards, run, *ENDLESS, "--max-steps", step + 2) == 0
    assert final_state(run)["step"] == step + 2


@pytest.mark.slow
def test_a_job_ends_on_both_sides_when_the_cable_is_cut(
    cable: None, shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Nothing tells the connections, and both sides would wait for ten minutes."""
    run, logs = tmp_path / "run", [tmp_path / "0", tmp_path / "1"]
    with (
        side(0, shards, run, logs[0], *ENDLESS, **elastic(0)) as a,
        side(1, shards, run, logs[1], *ENDLESS, **elastic(1)) as b,
    ):
        wait_for_step(run, 4, a, b)
        ip("-n", NAMES[1], "link", "set", "eth0", "down")
        try:
            assert a.wait(SECONDS) != 0
            assert ranks_end(1, within=SECONDS)
        finally:
            ip("-n", NAMES[1], "link", "set", "eth0", "up")
    assert "process 1, on " in logs[0].read_text()
    assert all("shows no sign of life" in log.read_text() for log in logs)
    step = final_state(run)["step"]
    assert train(shards, run, *ENDLESS, "--max-steps", step + 2) == 0
    assert final_state(run)["step"] == step + 2


def stop(run: pathlib.Path, jobs: Sequence[subprocess.Popen[bytes]], logs: Sequence[pathlib.Path]) -> None:
    """SIGUSR1 to every machine's torchrun, as Slurm does: all ranks save and end, and are not restarted."""
    for job in jobs:
        job.send_signal(signal.SIGUSR1)
    for job, log in zip(jobs, logs, strict=True):
        assert job.wait(SECONDS) != 0
        assert "closing signal SIGUSR1" in log.read_text()  # there was a rank, not only a torchrun that waits
    assert f"stopped by SIGUSR1 at step {final_state(run)['step']};" in "".join(log.read_text() for log in logs)


@pytest.mark.slow
def test_a_machine_that_died_may_come_back(cable: None, shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With a restart left, the survivor waits for the other to be started again; both go on from the checkpoint."""
    run, logs = tmp_path / "run", [tmp_path / name for name in "012"]
    restarts = {"PET_MAX_RESTARTS": 2}
    with side(0, shards, run, logs[0], *ENDLESS, **elastic(0), **restarts) as a:
        with side(1, shards, run, logs[1], *ENDLESS, **elastic(1), **restarts) as b:
            wait_for_step(run, 4, a, b)
            kill(b)
        step = final_state(run)["step"]
        with side(1, shards, run, logs[2], *ENDLESS, **elastic(1), **restarts) as b:
            wait_for_step(run, step + 4, a, b, seconds=SECONDS)
            stop(run, (a, b), (logs[0], logs[2]))
    assert logs[0].read_text().count(f"continuing {run} from step ") == 1


@pytest.mark.slow
def test_machines_leave_and_join_an_elastic_job(cable: None, shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """From one to two machines: the survivor goes on alone, and with the other once that has come back."""
    run, logs = tmp_path / "run", [tmp_path / name for name in "012"]
    sizes = {"PET_NNODES": "1:2", "PET_MAX_RESTARTS": 2}
    with side(0, shards, run, logs[0], *ENDLESS, **elastic(0), **sizes) as a:
        with side(1, shards, run, logs[1], *ENDLESS, **elastic(1), **sizes) as b:
            wait_for_step(run, 4, a, b)
            kill(b)
        alone = wait_for_step(run, final_state(run)["step"] + 4, a, seconds=SECONDS)
        with side(1, shards, run, logs[2], *ENDLESS, **elastic(1), **sizes) as b:
            deadline = time.monotonic() + SECONDS
            while logs[0].read_text().count("continuing") < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
            together = wait_for_step(run, alone + 4, a, b, seconds=SECONDS)
            wait_for_step(run, together + 4, a, b, seconds=SECONDS)
            stop(run, (a, b), (logs[0], logs[2]))
    assert logs[0].read_text().count("stopped by SIGTERM") == 1  # nothing was lost when the other joined
