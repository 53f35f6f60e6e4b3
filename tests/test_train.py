"""Training as a user runs it: resume, signals, several processes, and bad input."""

import errno
import fcntl
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image
from support.commands import ROOT, one_line, one_line_of, typed
from support.forks import RunCommand, finished, succeed, with_small_files
from support.launch import ENDLESS, command, equal, final_state, train, train_on_ranks, wait_for_step
from support.launch import TINY as SMALL

from fasttrain.config import load_config, make_config
from fasttrain.formats.beton import BetonReader
from fasttrain.formats.manifest import Manifest
from fasttrain.run import folder
from fasttrain.run.checkpoint import load_checkpoint, saved_checkpoints
from fasttrain.run.metrics import read_metrics
from fasttrain.system.options import Settings
from fasttrain.train import main
from fasttrain.trained import images_of


@pytest.fixture(scope="module", params=["moco", "xmoco"])
def uninterrupted(
    request: pytest.FixtureRequest, shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, pathlib.Path]:
    run = tmp_path_factory.mktemp(request.param) / "run"
    assert train(shards, run, "--method", request.param) == 0
    return request.param, run


def test_a_finished_run_holds_everything(uninterrupted: tuple[str, pathlib.Path]) -> None:
    method, run = uninterrupted
    assert final_state(run)["step"] == 16
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.png", "report.html", "checkpoints", "lock", "ending.json",
    }  # fmt: skip
    assert Image.open(run / "samples.png").size[0] > 500
    metrics = read_metrics(run / "metrics.jsonl")
    assert [entry["step"] for entry in metrics] == list(range(2, 17, 2))
    names = {"loss", "contrast"} | ({"cross", "uniform"} if method == "xmoco" else set())
    names |= {"contrastive_accuracy", "positive_similarity", "negative_similarity", "queue_filled"}
    names |= {
        "epoch",
        "lr",
        "images_per_sec",
        "data_wait",
        "transfer_wait",
        "views_time",
        "rss_gib",
        "skipped",
        "replaced",
    }
    for entry in metrics:
        assert names <= set(entry)
        assert 0 <= entry["data_wait"] <= 1
    page = (run / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert page.count("<svg") >= 4
    assert "http" not in page.split("<body>")[0]


def test_resume_is_bit_identical(
    uninterrupted: tuple[str, pathlib.Path], shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Stopped at a random step, and then at another: the end is the same to the bit."""
    method, whole = uninterrupted
    run = tmp_path / "run"
    stops = sorted(random.sample(range(1, 16), 2))
    for stop in stops:
        assert train(shards, run, "--method", method, "--max-steps", stop) == 0
        assert final_state(run)["step"] == stop
    assert train(shards, run, "--method", method, "--workers", 3) == 0
    assert equal(final_state(whole), final_state(run)) == [], f"stopped at {stops}"
    steps = [entry["step"] for entry in read_metrics(run / "metrics.jsonl")]
    assert steps == sorted(set(steps) | set(range(2, 17, 2)))


def test_resume_from_a_damaged_checkpoint_uses_the_one_before(
    uninterrupted: tuple[str, pathlib.Path],
    shards: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    method, whole = uninterrupted
    run = tmp_path / "run"
    assert train(shards, run, "--method", method, "--max-steps", 9, "--checkpoint-every", 4) == 0
    newest = saved_checkpoints(run / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-5000])
    assert train(shards, run, "--method", method) == 0
    assert f"continuing {run} from step 8" in capsys.readouterr().err
    assert equal(final_state(whole), final_state(run)) == []


def test_a_finished_run_is_left_as_it_is_and_fresh_moves_it_aside(
    uninterrupted: tuple[str, pathlib.Path], shards: pathlib.Path
) -> None:
    method, run = uninterrupted
    before = saved_checkpoints(run / "checkpoints")[0].stat().st_mtime_ns
    assert train(shards, run, "--method", method) == 0
    assert saved_checkpoints(run / "checkpoints")[0].stat().st_mtime_ns == before
    copy = run.with_name("copy")
    shutil.copytree(run, copy)
    assert train(shards, copy, "--method", method, "--fresh", "--max-steps", 1) == 0
    assert final_state(copy)["step"] == 1
    assert final_state(copy.with_name("copy.previous-1"))["step"] == 16


def test_folder_loader_trains_on_plain_files(image_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert train(image_folder, tmp_path / "run", "--loader", "folder", "--max-steps", 2, "--tensorboard") == 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_plain_files_have_a_validation_split_set_apart(
    image_folder: pathlib.Path, tmp_path: pathlib.Path, run_command: RunCommand
) -> None:
    run, data = tmp_path / "run", image_folder / "train"
    assert train(data, run, "--val-fraction", 0.25, "--knn-every", 1, "--epochs", 1) == 0
    assert "knn_top1" in read_metrics(run / "metrics.jsonl")[-1]
    process = run_command("fasttrain/evaluate.py", run, "--knn")
    assert process.returncode == 0, process.stderr
    assert "knn_top1" in json.loads(process.stdout.splitlines()[-1])


def test_a_validation_split_that_was_set_apart_is_so_again_where_the_images_have_moved(
    image_folder: pathlib.Path, tmp_path: pathlib.Path, run_command: RunCommand
) -> None:
    run, data, moved = tmp_path / "run", tmp_path / "data", tmp_path / "moved"
    shutil.copytree(image_folder / "train", data)
    assert train(data, run, "--val-fraction", 0.25, "--max-steps", 1) == 0

    def evaluated(*words: object) -> str:
        process = run_command("fasttrain/evaluate.py", run, "--knn", *words)
        return process.stdout or one_line(process)

    there = evaluated()
    data.rename(moved)
    assert evaluated("--data", moved) == there != ""
    (moved / "class0" / "000.jpg").unlink()  # other images, whose validation split nobody has set apart
    assert "has no 'val' split" in evaluated("--data", moved)


@pytest.mark.parametrize("kind", ["file", "link to itself"])
def test_a_run_that_is_no_folder_is_refused(
    image_folder: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    run = tmp_path / "run"
    if kind == "file":
        run.touch()
    else:
        run.symlink_to(run)
    assert train(image_folder, run) == 2
    assert one_line_of(capfd.readouterr().err).endswith(f"{run} is no folder; choose another --run")


def test_a_run_inside_its_folder_of_images_is_refused(
    image_folder: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(image_folder)
    for run in (image_folder / "train" / "run", tmp_path / "link" / "runs" / "first"):
        assert train(image_folder, run) == 2
        assert "lies inside the folder of images" in capfd.readouterr().err
        assert not run.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_writes_a_checkpoint_and_the_run_goes_on_from_it(
    shards: pathlib.Path, tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    words = command(shards, run, *ENDLESS)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, 4, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f"stopped by {number.name}" in errors
    assert "Traceback" not in errors
    step = final_state(run)["step"]
    assert step >= 4
    assert train(shards, run, *ENDLESS, "--max-steps", step + 3) == 0
    assert final_state(run)["step"] == step + 3


def test_two_processes_train_and_go_on_together(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    more = ["--accumulate", "2", "--knn-every", "2", "--optimizer", "lars"]
    assert [rank.returncode for rank in train_on_ranks(tmp_path, 2, shards, run, *more, "--max-steps", 5)] == [0, 0]
    words = [str(ROOT / "fasttrain/train.py"), "--data", str(shards), "--run", str(run), *SMALL, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([*torchrun, *words], capture_output=True, text=True, timeout=200, env=environment)
    assert process.returncode == 0, process.stderr
    assert final_state(run)["step"] == 16
    assert "continuing" in process.stderr
    assert load_checkpoint(run / "checkpoints" / "best.pt").state["step"] in (8, 16)
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")][-1] == 16


def test_bad_input_is_one_line_and_status_2(
    run_command: RunCommand, shards: pathlib.Path, image_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    cases = [
        (["--data", tmp_path / "nowhere"], "no such folder"),
        (["--data", shards, "--method", "mocko"], "choose from: moco, xmoco"),
        (["--data", shards, "--batch-size", 1000], "larger than the data set"),
        (["--data", shards, "--batch-size", 16, "--run", tmp_path / "other"], "not a run folder"),
        (["--data", shards, "--gpu", 1], "Unrecognized options: --gpu"),
    ]
    for words, message in cases:
        process = run_command("fasttrain/train.py", "--arch", "small", "--size", 16, *words)
        assert process.returncode == 2, process.stderr
        assert message in one_line(process)
    assert (tmp_path / "other" / "file").read_text() == "mine"


def test_other_settings_in_the_same_folder_are_refused(
    uninterrupted: tuple[str, pathlib.Path], shards: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, run = uninterrupted
    assert train(shards, run, "--method", method, "--temperature", "0.3") == 2
    assert "--temperature was 0.2, now 0.3" in capsys.readouterr().err
    assert final_state(run)["step"] == 16


def test_a_checkpoint_of_another_run_is_refused(
    uninterrupted: tuple[str, pathlib.Path],
    shards: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--method", uninterrupted[0], "--dim", 8, "--max-steps", 1) == 0
    shutil.copy(saved_checkpoints(uninterrupted[1] / "checkpoints")[0], run / "checkpoints")
    assert train(shards, run, "--method", uninterrupted[0], "--dim", 8) == 2
    assert "checkpoint of" in (error := capsys.readouterr().err)
    assert "--dim was 16, now 8" in error


def test_another_data_set_under_the_same_run_is_refused(
    uninterrupted: tuple[str, pathlib.Path], image_folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, run = uninterrupted
    assert train(image_folder / "val", run, "--method", method) == 2
    assert "begun with other images" in capsys.readouterr().err


def test_a_run_that_is_under_way_is_left_alone(
    uninterrupted: tuple[str, pathlib.Path],
    shards: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A second process would write into the same files. It waits for the first to end, then gives up."""
    method, run = uninterrupted
    monkeypatch.setattr(folder, "PATIENCE_SECONDS", 0.5)
    for more in ([], ["--fresh"]):
        with open(run / "lock", "w", encoding="utf-8") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert train(shards, run, "--method", method, *more) == 2
        assert f"another process is training in {run}" in capsys.readouterr().err
    assert train(shards, run, "--method", method) == 0


def test_a_file_system_without_locks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder.prepare(tmp_path / "run", Settings.of(make_config(data="x")), False).close()
    warning = (
        f"{tmp_path / 'run'} can't be locked ({os.strerror(errno.ENOLCK)}): two processes could write here at once"
    )
    assert capsys.readouterr().err == f"warning: {warning}\n"


def test_damaged_config_is_one_clear_line(
    uninterrupted: tuple[str, pathlib.Path],
    shards: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(uninterrupted[1], tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    assert train(shards, tmp_path / "run", "--method", uninterrupted[0]) == 2
    assert "config.json" in capsys.readouterr().err


def test_full_disk_stops_with_the_last_good_checkpoint_kept(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--max-steps", 2) == 0
    words = ["--data", str(shards), "--run", str(run), *SMALL, "--checkpoint-every=3"]
    process = finished(tmp_path, with_small_files, 2_000_000, main, words)
    assert process.returncode == 1, process.stderr
    assert "step-000000002.pt" in one_line(process)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000000002.pt"]
    assert train(shards, run) == 0
    assert final_state(run)["step"] == 16


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--lr", "1e30", "--checkpoint-every", 1, "--keep-last", 0, "--epochs", 10) == 1
    assert "the loss or its gradients were not finite in 20 of" in capsys.readouterr().err
    for path in saved_checkpoints(run / "checkpoints"):
        assert load_checkpoint(path).state["step"] < 4


def test_evaluating_a_run_without_a_checkpoint_says_what_to_do(
    shards: pathlib.Path, tmp_path: pathlib.Path, run_command: RunCommand
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--max-steps", 1) == 0
    for path in saved_checkpoints(run / "checkpoints"):
        path.unlink()
    process = run_command("fasttrain/evaluate.py", run, "--data", shards)
    assert process.returncode == 2
    assert "no checkpoint yet: training writes one every 1000 steps" in one_line(process)
    process = run_command("fasttrain/evaluate.py", run, "--data", shards, "--best")
    assert process.returncode == 2
    assert "has no best.pt: train with --knn-every" in one_line(process)


def test_a_report_says_when_training_has_gone_on_since_the_evaluation(
    shards: pathlib.Path, tmp_path: pathlib.Path, run_command: RunCommand
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, "--max-steps", 2) == 0
    assert run_command("fasttrain/evaluate.py", run, "--data", shards, "--knn").returncode == 0
    stale = "The accuracy is that of step 2; training has gone on to step 4"
    assert stale not in (run / "report.html").read_text()
    assert train(shards, run, "--max-steps", 4) == 0
    assert stale in (run / "report.html").read_text()


def test_evaluate_and_report_as_a_user(
    uninterrupted: tuple[str, pathlib.Path], shards: pathlib.Path, run_command: RunCommand
) -> None:
    _, run = uninterrupted
    process = run_command("fasttrain/evaluate.py", run, "--data", shards, "--knn", "--linear", "--untrained", "--k", 5)
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout.splitlines()[-1])
    for name in ("knn_top1", "linear_top1", "knn_top1_untrained", "linear_top1_untrained"):
        assert 0 <= figures[name] <= 100
    assert figures["step"] == 16
    process = run_command("fasttrain/report.py", run)
    last = json.loads(process.stdout.splitlines()[-1])
    assert last["report"] == str(run / "report.html")
    assert last["knn_top1"] == figures["knn_top1"]
    assert last["images_per_sec"] > 0
    assert "kNN top-1" in (run / "report.html").read_text()
    assert not list(run.glob("features-*"))


MINE = """
from torch import nn


def make(size):
    return nn.Sequential(nn.Conv2d(3, 8, size // 4, size // 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
"""


@pytest.mark.parametrize("arch", [pytest.param("timm:resnet18", marks=pytest.mark.slow), "encoder_of_mine:make"])
def test_an_encoder_of_another_library_or_of_one_s_own_is_trained_and_evaluated(
    shards: pathlib.Path, tmp_path: pathlib.Path, run_command: RunCommand, arch: str
) -> None:
    (tmp_path / "encoder_of_mine.py").write_text(MINE)
    words = "fasttrain/train.py", "--data", shards, "--run", "run", *SMALL, "--arch", arch, "--method", "moco"
    for steps in (1, 2):
        process = run_command(*words, "--max-steps", steps)
        assert process.returncode == 0, process.stderr
    assert "continuing run from step 1" in process.stderr
    process = run_command("fasttrain/evaluate.py", "run", "--knn")
    if arch.startswith("encoder_of_mine"):
        assert f"wants the code of {arch}, which runs only where --arch names it, too" in one_line(process)
        process = run_command("fasttrain/evaluate.py", "run", "--knn", "--arch", arch)
    assert process.returncode == 0, process.stderr
    assert 0 <= json.loads(process.stdout.splitlines()[-1])["knn_top1"] <= 100


def test_an_evaluation_finds_the_runs_images_and_statistics_from_anywhere(
    shards: pathlib.Path, tmp_path: pathlib.Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What views are normalised by belongs to the run: without it the figures of a set that has moved are others."""
    data, moved, run = tmp_path / "data", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(shards, data)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert train(pathlib.Path("data"), run, "--max-steps", 2) == 0
    record = json.loads((run / "config.json").read_text())
    assert (record["config"]["data"], record["data"]["path"]) == ("data", str(data))
    assert record["data"]["mean"] == Manifest.load(data).pixel_mean == list(final_state(run)["mean"])

    def figures(*words: object) -> dict:
        process = typed("fasttrain/evaluate.py", run, "--knn", *words, cwd=tmp_path / "elsewhere")
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    there = figures()
    data.rename(moved)
    process = run_command("fasttrain/evaluate.py", run, "--knn")
    assert process.returncode == 2
    assert f"{data}, the images that {run} was trained on, are not there now" in one_line(process)
    assert figures("--data", moved) == there
    assert len(json.loads((run / "evaluation.json").read_text())["evaluations"]) == 1
    assert train(pathlib.Path("moved"), run, "--max-steps", 4) == 0
    assert figures()["step"] == 4


def test_a_run_from_before_statistics_were_recorded_finds_them_where_its_images_have_moved(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(shards, gone)
    assert train(gone, run, "--max-steps", 1) == 0
    record = json.loads((run / "config.json").read_text())
    del record["data"]
    (run / "config.json").write_text(json.dumps(record))
    config = load_config(run)
    assert images_of(run, config, "").mean == tuple(Manifest.load(shards).pixel_mean)
    shutil.rmtree(gone)
    assert images_of(run, config, str(shards)).mean == tuple(Manifest.load(shards).pixel_mean)


def test_a_channel_that_is_the_same_everywhere_is_trained_on(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """As those that a fluorescence microscope leaves black; a manifest may say 0 as a whole number."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["pixel_mean"][0] = manifest["pixel_std"][0] = 0
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert train(data, run, "--max-steps", 1) == 0
    assert read_metrics(run / "metrics.jsonl")[-1]["skipped"] == 0
    assert json.loads((run / "config.json").read_text())["data"]["std"][0] == 1


def test_resident_and_thread_loader_end_with_the_same_weights(
    uninterrupted: tuple[str, pathlib.Path], shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    method, whole = uninterrupted
    run = tmp_path / "run"
    for more in (["auto", "--max-steps", 7], ["resident"]):
        assert train(shards, run, "--method", method, "--loader", *more) == 0
    assert equal(final_state(whole), final_state(run)) == []


def test_too_many_broken_images_end_training_by_the_fraction_given(
    shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    reader = BetonReader(data / "train-00000.beton")
    with open(reader.path, "r+b") as file:
        for i in range(12):
            file.seek(int(reader.pointer_N[i]) + 2)
            file.write(b"\0" * 16)
    assert train(data, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "samples can't be decoded (--max-failed-fraction allows more); the last: sample" in error
    assert train(data, tmp_path / "other", "--max-failed-fraction", "0.5", "--max-steps", 5) == 0
    words = ["--max-failed-fraction", 0.5, "--max-steps", 5, "--batch-norm", "plain", "--health-every", 0]
    succeed(train_on_ranks(tmp_path, 2, data, tmp_path / "two", *words))
    one, two = (
        [entry["replaced"] for entry in read_metrics(tmp_path / run / "metrics.jsonl") if "replaced" in entry]
        for run in ("other", "two")
    )
    assert sum(one) > 0
    assert one == two  # of all ranks
    assert train(data, tmp_path / "other", "--max-failed-fraction", "1.5") == 2
