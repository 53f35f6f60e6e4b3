"""The list of runs, as a person asks for it."""

import json
import os
import pathlib
import shutil
from typing import Any

import pytest
from support.commands import one_line
from support.forks import RunCommand
from support.launch import ENDLESS, command, started, train, wait_for_step

from fasttrain.jobs import runs as job
from fasttrain.jobs.options import RunsConfig
from fasttrain.jobs.runs import KEYS, in_order, run_folders
from fasttrain.run.ending import Ending
from fasttrain.run.evaluations import Evaluation, keep_evaluations
from fasttrain.run.summary import Accuracy, Summary
from fasttrain.runs import main


def make_run(run: pathlib.Path, **settings: Any) -> pathlib.Path:
    """As much of a run folder as is looked at."""
    run.mkdir(parents=True)
    config = {"method": "moco", "arch": "small", "data": "/data/set", "preset": "demo", **settings}
    (run / "config.json").write_text(json.dumps({"config": config, "steps": {"last": 1000, "per_epoch": 10}}))
    entries = ({"step": step, "loss": 2.0, "images_per_sec": 1234.0} for step in (10, 20))
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return run


def listed(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]


def test_real_runs_are_listed_with_what_they_reached_and_how_they_ended(
    shards: pathlib.Path, tmp_path: pathlib.Path, run_command: RunCommand, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "160")
    folder = tmp_path / "runs"
    assert train(shards, folder / "good", "--epochs", 2, "--knn-every", 1) == 0
    assert train(shards, folder / "deep/er/bad", "--method", "moco", "--epochs", 99, "--lr", "1e30") == 1
    with started(command(shards, folder / "going", *ENDLESS), tmp_path / "log") as process:
        wait_for_step(folder / "going", 4, process)
        states = {pathlib.Path(run["run"]).name: run["state"] for run in listed(capsys, folder)}
        assert states == {"good": "done", "bad": "failed", "going": "running"}
        process.kill()
        process.wait()
    runs = {pathlib.Path(run["run"]).name: run for run in listed(capsys, folder)}
    assert runs["going"]["state"] == "killed"
    assert runs["bad"]["line"].startswith("the loss or its gradients were not finite in")
    good = runs["good"]
    assert (good["method"], good["arch"], good["data"]) == ("xmoco", "small", shards.name)
    assert (good["step"], good["last_step"], good["epochs"]) == (8, 8, 2.0)
    assert (good["knn_step"], good["knn_source"], good["protocol"]) == (8, "training", {"knn": {}})
    assert 0 <= good["knn_top1"] <= 100
    assert good["images_per_sec"] > 0
    table = run_command("fasttrain/runs.py", folder)
    assert table.returncode == 0
    (row,) = (line for line in table.stdout.splitlines() if line.startswith("good"))
    assert {"8/8", "2.0", f"{good['knn_top1']:.1f}*", "done"} <= set(row.split())
    assert "failed: deep/er/bad: the loss or its gradients were not finite" in table.stdout


def test_runs_is_where_they_are_looked_for_if_nothing_else_is_said(
    tmp_path: pathlib.Path, run_command: RunCommand
) -> None:
    missing = run_command("fasttrain/runs.py")
    assert missing.returncode == 2
    assert "there is no folder runs: name the one that holds the runs" in one_line(missing)
    (tmp_path / "runs").mkdir()
    assert run_command("fasttrain/runs.py").stdout == "no runs in runs\n"
    assert json.loads(run_command("fasttrain/runs.py", "--json").stdout) == {"runs": []}
    make_run(tmp_path / "runs/one")
    assert "one" in run_command("fasttrain/runs.py", "--sort", "loss").stdout


def test_runs_are_found_at_any_depth_and_nothing_else_is(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = make_run(tmp_path / "elsewhere")
    folder = tmp_path / "runs"
    found = {make_run(folder / name) for name in ("a", "b/c", "b/d/e")}
    make_run(folder / "a/wandb/inner")  # a run's inside is its own
    make_run(folder / ".trash/old")
    (folder / "link").symlink_to(elsewhere)
    (folder / "up").symlink_to(folder)
    (folder / "hub").mkdir()
    (folder / "hub/config.json").write_text('{"architecture": "resnet18"}')  # another library's model
    begun = folder / "begun"  # of a run that ended before it had settings
    begun.mkdir()
    (begun / "lock").touch()
    assert set(run_folders(folder)) == found
    assert set(run_folders(folder / "a")) == {folder / "a"}
    assert not capsys.readouterr().err


def test_what_is_not_searched_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = make_run(tmp_path / "/".join("abcdefghijkl"))
    near = make_run(tmp_path / "near")
    assert list(run_folders(tmp_path)) == [near]
    assert f"warning: {deep.parent} lies too deep: it was not searched" in capsys.readouterr().err
    monkeypatch.setattr(job, "MOST_FOLDERS", 4)
    assert list(run_folders(tmp_path / "a")) == []
    assert "warning: more than 4 folders: 1 and what is in them were not searched" in capsys.readouterr().err


def test_damaged_runs_are_listed_with_what_is_wrong(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "sound")
    (make_run(tmp_path / "cut") / "config.json").write_text('{"config": {')
    lost = make_run(tmp_path / "lost")
    (lost / "config.json").unlink()
    (lost / "lock").touch()
    runs = {pathlib.Path(run["run"]).name: run for run in listed(capsys, tmp_path)}
    assert {name: run["state"] for name, run in runs.items()} == {
        "sound": "killed", "cut": "damaged", "lost": "damaged",
    }  # fmt: skip
    assert "can't be read as a run's configuration" in runs["cut"]["line"]
    assert "no config.json" in runs["lost"]["line"]
    assert runs["lost"]["step"] is None
    assert main([str(tmp_path)]) == 0
    assert "damaged: cut: " in capsys.readouterr().out.replace("\n", " ")


VALUES: dict[str, tuple[Any, Any, Any]] = {  # first, second, missing
    "when": (200.0, 100.0, 0.0), "method": ("byol", "moco", ""), "arch": ("a", "b", ""), "data": ("a", "b", ""),
    "step": (20, 10, None), "epochs": (2.0, 0.0, None), "loss": (0.5, 2.0, None), "images_per_sec": (9.0, 1.0, None),
    "knn": (Accuracy(90.0, 1, "evaluation"), Accuracy(0.0, 9, "training"), None),
    "linear": (Accuracy(90.0, 1, "evaluation"), Accuracy(50.0, 9, "evaluation"), None),
}  # fmt: skip


@pytest.mark.parametrize("column", VALUES)
def test_the_best_comes_first_and_what_is_not_known_last(column: str) -> None:
    runs = []
    for name, value in zip("zyx", VALUES[column], strict=True):
        others = {"when": 7.0, column: value}
        runs.append(Summary(pathlib.Path(name), Ending("done"), **others))
    for order in (runs, runs[::-1]):
        assert [run.path.name for run in in_order(order, column)] == ["z", "y", "x"]


def test_each_column_can_be_sorted_by_and_equal_ones_keep_the_order_of_names() -> None:
    runs = [Summary(pathlib.Path(name), Ending(state), 7.0) for name, state in (("b", "x"), ("a", "x"), ("c", "a"))]
    for column in KEYS:
        expected = "cab" if column == "state" else "abc"
        assert "".join(run.path.name for run in in_order(runs, column)) == expected
        assert RunsConfig(sort=column).sort == column  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_is_whole_at_both_widths(
    width: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("short", "an-experiment/with-a-name-that-goes-on/lr-0.03-batch-4096-epochs-800"):
        run = make_run(tmp_path / name)
        figures = [Evaluation(protocol, 20, False, {}, "x", "f", 9, 61.25) for protocol in ("knn", "linear")]
        keep_evaluations(run, figures)
    (tmp_path / "short/metrics.jsonl").write_text('{"step": 30, "loss": 1.5, "images_per_sec": 1234.0}\n')
    monkeypatch.setenv("COLUMNS", str(width))
    capsys.readouterr()
    assert main([str(tmp_path), "--sort", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    header, short = lines[0].split(), next(line.split() for line in lines if line.startswith("short"))
    named = {"run", "method", "step", "kNN", "linear", "images/s", "state", "when"}
    assert set(header) == (named if width == 80 else named | {"arch", "data", "epochs", "loss"})
    assert {"moco", "30/1,000", "61.2←", "1,234", "killed"} <= set(short)
    folded = "".join(line[: len(lines[0].partition("method")[0])].strip() for line in lines)
    assert "an-experiment/with-a-name-that-goes-on/lr-0.03-batch-4096-epochs-800" in folded
    assert "← of weights from before the run's last step: evaluate it again" in lines


def test_names_of_strangers_reach_the_terminal_harmless(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a\x1b[31m[bold]b", method="c\x07d")
    odd = make_run(tmp_path / "plain")
    odd.rename(tmp_path / os.fsdecode(b"r\xe9n"))
    assert main([str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert r"a\x1b[31m[bold]b" in table
    assert "\x1b" not in table
    assert "\x07" not in table
    assert r"r\udce9n" in table


def test_many_that_ended_alike_share_a_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    first = make_run(tmp_path / "0")
    content = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({"config": content["config"]}))
    for number in range(1, 6):
        shutil.copytree(first, tmp_path / str(number))
    assert main([str(tmp_path), "--sort", "run"]) == 0
    out = capsys.readouterr().out
    assert "unknown: 0, 1, 2 and 3 more: not running; it is by a version that kept no endings" in out
    assert out.count("not running") == 1
