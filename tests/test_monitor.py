"""kNN while training: what it measures, what it keeps, and that it leaves no trace in the weights."""

import json

import numpy as np
import torch
from test_train import equal, final_state, train

from fasttrain import monitor
from fasttrain.checkpoint import load_checkpoint, saved_checkpoints
from fasttrain.data import open_dataset
from fasttrain.features import Part
from fasttrain.log import read_metrics


def test_part_is_spread_evenly_and_keeps_names_and_labels(shards):
    store = open_dataset(shards, "train")
    part = Part(store, 7)
    places = [round(i * (store.num_samples - 1) / 6 - 0.499) for i in range(7)]
    assert part.num_samples == 7
    assert [part.name(i) for i in range(7)] == [store.name(place) for place in places]
    assert part.labels(np.arange(7)).tolist() == store.labels(np.array(places)).tolist()
    assert part.read(3)[:2] == store.read(places[3])[:2]
    assert Part(store, 10**6).num_samples == store.num_samples


def test_the_best_checkpoint_is_kept_and_training_is_not_disturbed(shards, tmp_path, monkeypatch, run_command):
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert train(shards, plain) == 0
    monkeypatch.setattr(monitor, "MOST", 20)
    assert train(shards, run, "--knn-every", 1, "--keep-last", 1, "--max-steps", 9) == 0
    assert train(shards, run, "--knn-every", 1, "--keep-last", 1) == 0
    state, other = final_state(run), final_state(plain)
    best = state.pop("best")
    other.pop("best")
    assert equal(other, state) == []

    measured = {e["step"]: e["knn_top1"] for e in read_metrics(run / "metrics.jsonl") if "knn_top1" in e}
    assert list(measured) == [4, 8, 12, 16]
    first_best = max(measured, key=lambda step: measured[step])
    assert best == {"step": first_best, "knn_top1": measured[first_best]}
    assert load_checkpoint(run / "checkpoints" / "best.pt").state["step"] == first_best
    assert [path.name for path in saved_checkpoints(run / "checkpoints")] == ["step-000000016.pt"]
    assert "kNN top-1 while training" in (run / "report.html").read_text()
    assert not list(run.glob("features-*"))

    process = run_command("fasttrain/evaluate.py", run, "--knn", "--best")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1])["step"] == first_best
    stale = "The accuracy is that of step" in (run / "report.html").read_text()
    assert stale == (first_best != 16)


def test_a_run_that_ended_before_it_linked_its_best_does_so_when_continued(shards, tmp_path):
    run = tmp_path / "run"
    assert train(shards, run, "--knn-every", 1, "--max-steps", 4) == 0
    (run / "checkpoints" / "best.pt").unlink()
    assert train(shards, run, "--knn-every", 1, "--max-steps", 5) == 0
    assert load_checkpoint(run / "checkpoints" / "best.pt").state["step"] == 4


def test_knn_of_a_set_without_val_split_is_one_line(image_folder, tmp_path, capsys):
    assert train(image_folder / "val", tmp_path / "run", "--knn-every", 1) == 2
    assert "val" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_monitor_leaves_the_encoder_in_training(shards):
    from fasttrain.config import TrainConfig
    from fasttrain.methods import make_method

    config = TrainConfig(data=str(shards), arch="small", size=16, queue_size=40, dim=8)
    method = make_method(config)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    random_state = torch.get_rng_state()
    accuracy = monitor.KnnMonitor(config, torch.device("cpu"), 1)(method, shards.parent)
    assert 0 <= accuracy <= 100
    assert all(module.training for module in method.modules())
    assert equal(before, dict(method.state_dict())) == []
    assert torch.equal(random_state, torch.get_rng_state())
