"""evaluate.py as a user runs it: on all ranks, after a kill, on several runs and on other images."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.forks import RunCommand, on_ranks
from support.launch import train

from fasttrain.evaluate import main
from fasttrain.evaluation import extraction
from fasttrain.jobs.scratch import FOLDER
from fasttrain.run.evaluations import read_evaluations


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
    assert len(list((run / FOLDER).glob("*/train/*[0-9].npy"))) == 1
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


def test_an_encoder_is_evaluated_on_other_images_too(
    run: Path, tar_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = evaluated(capsys, run, "--knn", "--transfer", tar_shards)
    name = f"knn_on_{tar_shards.name}"
    assert 0 <= line[f"{name}_top1"] <= 100
    assert set(line["protocol"]) == {"knn", name}
    assert [each.data for each in read_evaluations(run)][1] == str(tar_shards)


def test_without_a_run_one_line_says_so(run_command: RunCommand) -> None:
    process = run_command("fasttrain/evaluate.py")
    assert process.returncode == 2
    assert "RUN" in process.stderr


def test_lists_of_k_temperatures_and_shots_have_a_figure_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """72 images of train: 200 and 300 neighbours are both all of them."""
    words = ["--k", 3, 200, 300, "--temperature", 0.07, 0.1, "--shots", 1, 20, "--draws", 2]
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
