"""evaluate.py as a user runs it: on all ranks, after a kill, on several runs and on other images."""

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.forks import RunCommand, on_ranks
from support.launch import train

from fasttrain.evaluate import main
from fasttrain.evaluation import extraction
from fasttrain.jobs import subjects
from fasttrain.jobs.evaluate import summary
from fasttrain.jobs.scratch import FOLDER, Scratch
from fasttrain.run.evaluations import Evaluation, read_evaluations


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("evaluated") / "run"
    assert train(shards, run, "--max-steps", 4) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(list(map(str, words))) == 0
    return last_line(capsys.readouterr().out)


def test_every_figure_comes_with_its_interval_its_classes_and_its_settings(
    run: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = evaluated(capsys, run, "--knn", "--k", 3, "--untrained")
    assert line["knn_low"] <= line["knn_top1"] <= line["knn_high"]
    assert line["protocol"] == {"knn": {"features": "encoder", "k": 3, "temperature": 0.1}}
    untrained, own = read_evaluations(run)
    assert (untrained.untrained, own.untrained) == (True, False)
    assert own.per_class is not None
    assert sum(own.per_class.values()) / len(own.per_class) == pytest.approx(own.balanced, abs=0.02)
    assert own.num_images == 24
    assert not (run / FOLDER).exists()


def test_two_ranks_give_ones_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "--batch-size", "4", "--untrained"]  # so that both have parts to do
    alone = evaluated(capsys, *words)
    together, other = on_ranks(tmp_path, 2, main, words)
    assert (together.returncode, other.returncode) == (0, 0), together.stderr + other.stderr
    assert last_line(together.stdout) == alone
    assert other.stdout == ""


def test_features_that_are_finished_survive_a_kill(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [run, "--knn", "--batch-size", 2]
    whole = evaluated(capsys, *words)
    real, saved = extraction._save, []

    def save(path: Path, values: Any) -> None:
        if len(saved) == 3:  # the labels and the rows of the first part, the labels of the second
            raise KeyboardInterrupt
        saved.append(path)
        real(path, values)

    monkeypatch.setattr(extraction, "_save", save)
    assert main(list(map(str, words))) == 130
    monkeypatch.undo()
    (rows,) = (run / FOLDER).glob("*/train/*[0-9].npy")
    rows.with_name("000002.npy").write_bytes(rows.read_bytes())  # alone, as a kill amid the removal leaves it
    read: list[int] = []
    count = extraction.outputs
    monkeypatch.setattr(
        extraction,
        "outputs",
        lambda network, store, *more: read.append(store.num_samples) or count(network, store, *more),
    )
    assert evaluated(capsys, *words) == whole
    assert read[0] == 72 - 32  # sixteen batches of two were there
    assert not (run / FOLDER).exists()


def test_what_is_finished_survives_a_kill_while_other_weights_are_evaluated(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Untrained weights come first, and once more after the kill: they must leave the others' features alone."""
    words = [run, "--knn", "--batch-size", 2, "--untrained"]
    whole = evaluated(capsys, *words)
    real, saved = extraction._save, []

    def save(path: Path, values: Any) -> None:
        saved.append(path)
        if len(saved) == 12:  # rows and labels of three and one parts of the untrained network, of one part, labels
            raise KeyboardInterrupt
        real(path, values)

    monkeypatch.setattr(extraction, "_save", save)
    assert main(list(map(str, words))) == 130
    monkeypatch.undo()
    read: list[int] = []
    count = extraction.outputs
    monkeypatch.setattr(
        extraction,
        "outputs",
        lambda network, store, *more: read.append(store.num_samples) or count(network, store, *more),
    )
    assert evaluated(capsys, *words) == whole
    assert read == [72, 24, 72 - 32, 24]
    assert not (run / FOLDER).exists()


def test_features_of_other_settings_of_the_run_are_not_taken_for_its_own(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed of a run decides its untrained weights."""
    keys: list[str] = []

    class Noting(Scratch):
        def folder(self, key: dict[str, Any]) -> Path:
            keys.append(super().folder(key).name)
            return super().folder(key)

    monkeypatch.setattr("fasttrain.jobs.evaluate.Scratch", Noting)
    for seed in (0, 1):
        written = json.loads((run / "config.json").read_text())
        written["config"]["seed"] = seed
        (run / "config.json").write_text(json.dumps(written))
        evaluated(capsys, run, "--knn", "--untrained")
    first, second = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    assert not set(first) & set(second)


def test_ranks_that_find_different_checkpoints_say_so(run: Path, tmp_path: Path) -> None:
    together, other = on_ranks(tmp_path, 2, on_own_checkpoint, [str(run), "--knn"])
    assert (together.returncode, other.returncode) == (2, 2), together.stderr + other.stderr
    assert "different checkpoints" in together.stderr
    assert other.stderr == ""


def on_own_checkpoint(words: list[str]) -> int:
    """Each rank finds another one, as if a checkpoint were written just then."""
    real = subjects.chosen_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        digest = os.environ["RANK"] * 64
        patch.setattr(subjects, "chosen_checkpoint", lambda *found: real(*found)._replace(digest=digest))
        return main(words)


def test_what_an_evaluation_of_other_weights_has_left_goes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = run / FOLDER / "0123456789abcdef" / "train"
    left.mkdir(parents=True)
    (left / "000000.npy").write_bytes(b"old")
    evaluated(capsys, run, "--knn")
    assert not (run / FOLDER).exists()


def test_several_runs_give_means_and_deviations(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert train(shards, other, "--max-steps", 4, "--seed", 1) == 0
    figures = [evaluated(capsys, each, "--knn")["knn_top1"] for each in (run, other)]
    line = evaluated(capsys, run, other, "--knn")
    assert line["runs"] == 2
    assert line["knn_top1"] == pytest.approx(sum(figures) / 2, abs=0.01)
    assert line["knn_top1_std"] == pytest.approx(abs(figures[0] - figures[1]) / 2**0.5, abs=0.01)
    assert len(read_evaluations(run)) == len(read_evaluations(other)) == 1
    assert main([str(run), str(run), "--knn"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_settings_and_steps_that_differ_between_runs_are_told_of_each() -> None:
    def found(step: int, lr: float) -> list[Evaluation]:
        settings = {"grid": [0.1, 0.3], "lr": lr}
        return [Evaluation("linear", step, False, settings, "/images", "f", 10, top1=50.0)]

    assert summary([found(4, 0.1), found(2, 0.3)]) == {
        "step": [4, 2], "runs": 2, "linear_top1": 50.0, "linear_top1_std": 0.0,
        "protocol": {"linear": {"grid": [0.1, 0.3], "lr": [0.1, 0.3]}},
    }  # fmt: skip
    assert summary([found(4, 0.1), found(4, 0.1)])["step"] == 4


def test_runs_of_different_images_have_no_mean(
    run: Path, shards: Path, tar_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert train(tar_shards, other, "--max-steps", 2) == 0
    assert main([str(run), str(other), "--knn"]) == 2
    assert "different images" in capsys.readouterr().err
    assert evaluated(capsys, run, other, "--knn", "--data", shards)["runs"] == 2


def test_data_sets_of_one_name_are_refused(
    run: Path, shards: Path, tar_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their figures would be averaged under it."""
    others = [shutil.copytree(images, tmp_path / place / "set") for place, images in (("a", shards), ("b", tar_shards))]
    assert main([str(run), "--knn", "--transfer", *map(str, others)]) == 2
    assert "two data sets set" in capsys.readouterr().err


def test_an_encoder_is_evaluated_on_other_images_too(
    run: Path, tar_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = evaluated(capsys, run, "--knn", "--transfer", tar_shards)
    name = f"knn_on_{tar_shards.name}"
    assert 0 <= line[f"{name}_top1"] <= 100
    assert set(line["protocol"]) == {"knn", name}
    assert [each.data for each in read_evaluations(run)][1] == str(tar_shards)


def test_a_full_disk_is_named_and_what_is_finished_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        status = main([str(run), "--knn"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (part,) = (run / FOLDER).iterdir()
    assert status == 1
    assert f"{part}/train/000000.npy: File too large" in capsys.readouterr().err
    assert sorted(path.name for path in (part / "train").iterdir()) == ["000000.labels.npy"]


def test_without_a_run_one_line_says_so(run_command: RunCommand) -> None:
    process = run_command("fasttrain/evaluate.py")
    assert process.returncode == 2
    assert "RUN" in process.stderr


def test_an_option_of_a_protocol_that_is_not_done_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere", "--knn", "--solver", "lbfgs"]) == 2
    assert "--solver is of use only with --linear" in capsys.readouterr().err
    assert main(["nowhere", "--k", "5"]) == 2  # kNN is done where no protocol is named
    assert "nowhere" in capsys.readouterr().err


def test_lists_of_k_temperatures_and_shots_have_a_figure_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """72 images of train: 200 and 300 neighbours are both all of them."""
    words = ["--k", 3, 200, 300, "--temperature", 0.07, 0.1, "--shots", 1, 20, 1, "--draws", 2]
    line = evaluated(capsys, run, "--knn", *words)
    names = ["knn", "knn_k3_t0.1", "knn_k72_t0.07", "knn_k72_t0.1", "few_shot_1_a_class", "few_shot_20_a_class"]
    assert list(line["protocol"]) == names
    assert all(f"{name}_top1" in line for name in names)
    assert line["protocol"]["knn_k72_t0.1"] == {"features": "encoder", "k": 72, "k_asked": 200, "temperature": 0.1}
    assert [line["protocol"][name]["classes_with_fewer"] for name in names[4:]] == [0, 4]
    assert {found.name: found.num_images for found in read_evaluations(run)} == dict.fromkeys(names, 24)


def test_the_solver_is_the_one_that_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for solver in ("lbfgs", "sgd"):
        settings = evaluated(capsys, run, "--linear", "--solver", solver)["protocol"]["linear"]
        assert settings["solver"] == solver
