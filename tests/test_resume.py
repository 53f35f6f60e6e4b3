"""Going on with a run: all ranks from the same checkpoint or none, what does not fit, what is set aside, --fresh."""

import json

import pytest
from launch import final_state, train

from fasttrain.config import TrainConfig
from fasttrain.run_folder import prepare


@pytest.fixture
def run(shards, tmp_path):
    run = tmp_path / "run"
    assert train(shards, run, "--max-steps", 9) == 0
    return run


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_fresh_is_honoured_once_in_a_job(run, shards, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert train(shards, run, "--fresh", "--max-steps", 10) == 0
    assert not run.with_name("run.previous-1").exists()
    monkeypatch.setenv(name, "0")
    assert train(shards, run, "--fresh", "--max-steps", 2) == 0
    assert final_state(run)["step"] == 2
    assert final_state(run.with_name("run.previous-1"))["step"] == 10


def test_fresh_is_honoured_once_in_a_job_that_a_machine_joins(run, monkeypatch):
    """torchrun starts its processes again then, and does not count it; only the job's name is the same."""
    config = TrainConfig(data="", fresh=True)
    for job, moved in (("a", 1), ("a", 1), ("b", 2), ("none", 3), ("none", 4)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        prepare(run, config).close()
        assert len(list(run.parent.glob("run.previous-*"))) == moved, job


def test_a_run_that_ended_before_it_had_a_config_can_begin(tmp_path, shards):
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").touch()
    (run / "config.tmp").write_text('{"config": {')
    assert train(shards, run, "--max-steps", 1) == 0
    assert json.loads((run / "config.json").read_text())["config"]["dim"] == 16
    assert not (run / "config.tmp").exists()
