"""Going on with a run: all ranks from the same checkpoint or none, what does not fit, what is set aside, --fresh."""

import json

from launch import train


def test_a_run_that_ended_before_it_had_a_config_can_begin(tmp_path, shards):
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").touch()
    (run / "config.tmp").write_text('{"config": {')
    assert train(shards, run, "--max-steps", 1) == 0
    assert json.loads((run / "config.json").read_text())["config"]["dim"] == 16
    assert not (run / "config.tmp").exists()
