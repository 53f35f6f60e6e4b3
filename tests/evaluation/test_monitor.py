"""kNN while training: what it measures, what it keeps, and that it leaves no trace in the weights."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.forks import RunCommand, succeed
from support.launch import equal, final_state, train, train_on_ranks
from support.metrics import make_metrics
from support.steps import build, small

from fasttrain.engine.ranks import Ranks
from fasttrain.engine.step import TrainStep
from fasttrain.evaluation import features, monitor
from fasttrain.evaluation.accuracy import Accuracy
from fasttrain.evaluation.features import _on_disk
from fasttrain.evaluation.monitor import KnnEvents
from fasttrain.evaluation.watched import Interrupted, Watched
from fasttrain.formats.beton import BetonReader
from fasttrain.input import LoaderError, evenly, located, open_dataset
from fasttrain.run.checkpoint import load_checkpoint, saved_checkpoints
from fasttrain.run.metrics import read_metrics
from fasttrain.system.errors import DataError, RunError, UserError


def test_a_subset_is_spread_evenly_and_keeps_names_and_labels(shards: pathlib.Path) -> None:
    store = open_dataset(shards, "train")
    subset = evenly(store, 7)
    places = [round(i * (store.num_samples - 1) / 6 - 0.499) for i in range(7)]
    assert subset.num_samples == 7
    assert [subset.name(i) for i in range(7)] == [store.name(place) for place in places]
    assert subset.labels(np.arange(7)).tolist() == store.labels(np.array(places)).tolist()
    assert subset.read(3)[:2] == store.read(places[3])[:2]
    assert evenly(store, 10**6).num_samples == store.num_samples


def test_the_best_checkpoint_is_kept_and_training_is_not_disturbed(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, run_command: RunCommand
) -> None:
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert train(shards, plain) == 0
    monkeypatch.setattr(monitor, "MOST", 20)
    assert train(shards, run, "--knn-every", 1, "--keep-last", 1, "--max-steps", 9) == 0
    assert train(shards, run, "--knn-every", 1, "--keep-last", 1) == 0
    assert equal(final_state(plain), final_state(run)) == []

    measured = {e["step"]: e["knn_top1"] for e in read_metrics(run / "metrics.jsonl") if "knn_top1" in e}
    assert list(measured) == [4, 8, 12, 16]
    shares = {e["knn_majority"] for e in read_metrics(run / "metrics.jsonl") if "knn_top1" in e}
    assert len(shares) == 1
    first_best = max(measured, key=lambda step: measured[step])
    assert load_checkpoint(run / "checkpoints" / "best.pt").state["step"] == first_best
    assert [path.name for path in saved_checkpoints(run / "checkpoints")] == ["step-000000016.pt"]
    assert "kNN while training" in (run / "report.html").read_text()
    assert not list(run.glob("features-*"))

    process = run_command("fasttrain/evaluate.py", run, "--knn", "--best")
    assert process.returncode == 0, process.stderr
    last = json.loads(process.stdout.splitlines()[-1])
    assert last["step"] == first_best
    assert last["protocol"]["knn"]["checkpoint"] == "best by kNN on val"
    stale = "The accuracy is that of step" in (run / "report.html").read_text()
    assert stale == (first_best != 16)


def test_a_run_that_ended_before_it_linked_its_best_does_so_when_continued(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--knn-every", 1, "--max-steps", 4) == 0
    (run / "checkpoints" / "best.pt").unlink()
    assert train(shards, run, "--knn-every", 1, "--max-steps", 5) == 0
    assert load_checkpoint(run / "checkpoints" / "best.pt").state["step"] == 4


def accuracies(run: pathlib.Path) -> dict[int, float]:
    return {e["step"]: e["knn_top1"] for e in read_metrics(run / "metrics.jsonl") if "knn_top1" in e}


@pytest.mark.parametrize("moment", ["before", "in the middle"])
def test_a_signal_around_an_evaluation_finds_the_step_saved_and_the_evaluation_is_made_up_for(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(shards, whole, "--knn-every", 1) == 0

    if moment == "before":
        real = TrainStep.update
        monkeypatch.setattr(TrainStep, "update", lambda self, step, rates: (at(7, step), real(self, step, rates))[1])
    else:
        extracted = iter(range(100))  # twice in each evaluation
        real = features.center
        monkeypatch.setattr(features, "center", lambda *words: (at(2, next(extracted)), real(*words))[1])

    def at(wanted: int, now: int) -> None:
        if now == wanted:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(shards, run, "--knn-every", 1) == 143
    assert final_state(run)["step"] == 8
    assert list(accuracies(run)) == [4]
    assert not list(run.glob("features-*"))
    monkeypatch.undo()
    assert train(shards, run, "--knn-every", 1) == 0
    assert accuracies(run) == accuracies(whole)
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "knn_top1" in entry]
    assert [(entry["step"], entry["epoch"]) for entry in entries] == [(4, 0), (8, 1), (12, 2), (16, 3)]
    assert equal(final_state(whole), final_state(run)) == []
    best = [load_checkpoint(folder / "checkpoints" / "best.pt").state for folder in (whole, run)]
    assert equal(*best) == []


def test_an_evaluation_of_the_last_step_that_was_cut_short_is_made_up_for(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(features, "center", lambda *_words: os.kill(os.getpid(), signal.SIGTERM) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(shards, run, "--knn-every", 4)
    monkeypatch.undo()
    assert final_state(run)["step"] == 16
    assert train(shards, run, "--knn-every", 4) == 0
    assert list(accuracies(run)) == [16]


def test_an_evaluation_that_fails_is_said_and_neither_ends_the_run_nor_counts(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [OSError(5, "Input/output error"), UserError("no labels"), RunError("full"), DataError("bad label")]
    outcomes: list[Exception | float] = [*errors, 40.0, LoaderError("hangs"), 60.0, Interrupted(), 50.0]
    said: list[str] = []
    kept: list[int] = []
    monkeypatch.setattr(monitor, "keep_best", lambda _folder, step: kept.append(step))
    display: Any = SimpleNamespace(aside=lambda _text: contextlib.nullcontext(), say=said.append)
    nothing: Any = None
    watched = Watched(
        tmp_path, nothing, None, (), (), Ranks("cpu"), make_metrics(tmp_path), display, lambda: 15, first=0, last=9
    )

    def knn(*_words: object) -> Accuracy:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return Accuracy(outcome, None, 0.0, 0.0, 0.0, 0.0)

    events = KnnEvents(watched, cast("Any", knn), 1)
    returned = [events(step, 0) for step in (1, 2, 3, 4, 5, 6, 7, 8, 8)]
    assert returned == [0] * 7 + [15, 0]
    assert said == [f"kNN is not measured: {error}" for error in (*errors, "hangs")]
    assert accuracies(tmp_path) == {5: 40.0, 7: 60.0, 8: 50.0}
    assert kept == [5, 7]


def test_images_of_val_that_can_t_be_read_do_not_end_training_on_any_rank(
    image_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    for image in (data / "val").rglob("*.jpg"):
        image.write_bytes(image.read_bytes()[:200])
    words = ["--knn-every", 1, "--health-every", 0, "--batch-norm", "plain", "--max-steps", 8]
    done = train_on_ranks(tmp_path, 2, data, tmp_path / "run", *words)
    succeed(done)
    assert [each.stderr.count("kNN is not measured: ") for each in done] == [2, 0]
    assert final_state(tmp_path / "run")["step"] == 8


def test_knn_of_a_set_without_val_split_is_one_line(
    image_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(image_folder / "val", tmp_path / "run", "--knn-every", 1) == 2
    assert "val" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_monitor_leaves_the_encoder_in_training(shards: pathlib.Path) -> None:
    config = small(data=str(shards))
    method = build(config)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    random_state = torch.get_rng_state()
    knn = monitor.KnnMonitor(located(config.data.data), config.data, 0, 16, torch.device("cpu"), 1)
    found = knn(method, (0.5,) * 3, (0.5,) * 3, shards.parent, lambda: None)
    assert 0 <= found.top1 <= 100
    assert all(module.training for module in method.modules())
    assert equal(before, dict(method.state_dict())) == []
    assert torch.equal(random_state, torch.get_rng_state())


def test_features_have_no_name_and_a_full_disk_is_an_error(tmp_path: pathlib.Path) -> None:
    """A limit on file size stands for the full disk, which would end the process while it writes to the mapping."""
    values = _on_disk(tmp_path, (100, 50))
    values[:] = 7
    assert list(tmp_path.iterdir()) == []
    assert (values == 7).all()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(RunError, match="no room for the features of 10000 images"):
            _on_disk(tmp_path, (10_000, 500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_allowed_part_of_bad_images_holds_for_the_evaluation_too(
    shards: pathlib.Path, tmp_path: pathlib.Path, run_command: RunCommand
) -> None:
    """A run that may go on with half of its images must not end at its first evaluation."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    reader = BetonReader(data / "train-00000.beton")
    damaged = bytearray((data / "train-00000.beton").read_bytes())
    for i in range(reader.num_samples // 5):  # before the first place by which a shard is told from another file
        start = int(reader.pointer_N[i])
        damaged[start + 2 : start + int(reader.size_N[i])] = bytes(int(reader.size_N[i]) - 2)
    (data / "train-00000.beton").write_bytes(damaged)
    half = ["--max-failed-fraction", 0.5]
    assert train(data, run, "--knn-every", 1, "--max-steps", 4, *half) == 0
    assert [e for e in read_metrics(run / "metrics.jsonl") if "knn_top1" in e]
    assert run_command("fasttrain/evaluate.py", run, "--knn").returncode == 0
