"""Runs that are compared on one page."""

import json
import pathlib
import re

import pytest
from support.commands import one_line_of
from support.runs import evaluated, make_run, write_metrics

from fasttrain import report
from fasttrain.run.metrics import read_metrics


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    found = [make_run(tmp_path / f"run{n}", seed=n, temperature=0.1 * n) for n in (1, 2, 3)]
    for number, run in enumerate(found):
        evaluated(run, 60.0 + number)
    return found


def rows(page: str) -> dict[str, list[str]]:
    """The cells of the table, by what they tell."""
    found = (re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page))
    return {cells[0]: [re.sub(r"<[^>]*>", " ", cell).strip() for cell in cells[1:]] for cells in found if cells}


def compared(runs: list[pathlib.Path]) -> str:
    assert report.main([*map(str, runs)]) == 0
    return (runs[0].parent / "comparison.html").read_text("utf-8")


def test_what_differs_is_in_one_table(runs: list[pathlib.Path], capsys: pytest.CaptureFixture[str]) -> None:
    page = compared(runs)
    table = rows(page)
    assert [cell.split()[0] for cell in table["kNN top-1, %"]] == ["60.0", "61.0", "62.0"]
    assert table["--temperature"] == ["0.1", "0.2", "0.3"]
    assert "--lr" not in table
    assert re.findall(r"class=\"(?:number )?best\">(.*?)</td>", page) == ["<span>62.0</span> <small>58.0–66.0</small>"]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["report"] == str(runs[0].parent / "comparison.html")
    assert [figures["knn_top1"] for figures in last["runs"].values()] == [60.0, 61.0, 62.0]


def test_runs_that_were_shuffled_otherwise_say_so(runs: list[pathlib.Path]) -> None:
    assert "shuffle of the images" not in rows(compared(runs))
    path = runs[0] / "config.json"
    record = json.loads(path.read_text("utf-8"))
    starts = [{**each, "shuffle": "global"} for each in record["starts"]]
    path.write_text(json.dumps({**record, "starts": starts}), "utf-8")
    assert rows(compared(runs))["shuffle of the images"] == ["global", *["block, 64 shards at once"] * 2]


def test_figures_that_are_not_alike_are_not_ranked_and_said_not_to_be(runs: list[pathlib.Path]) -> None:
    evaluated(runs[2], 90.0, fingerprint="another")
    page = compared(runs)
    assert "kNN top-1 was measured on different images." in page
    assert 'best">' not in page


def test_what_a_probe_found_on_the_way_keeps_no_figures_apart(runs: list[pathlib.Path]) -> None:
    for number, run in enumerate(runs):
        evaluated(run, 60.0 + number, protocol="linear", settings={"solver": "sgd", "lr": 0.1 * number})
    page = compared(runs)
    assert "measured with different settings" not in page
    assert re.findall(r'best">(.*?)</td>', page) == ["<span>62.0</span> <small>58.0–66.0</small>"] * 2
    evaluated(runs[0], 90.0, protocol="linear", settings={"solver": "lbfgs"})
    assert "linear top-1 was measured with different settings." in compared(runs)


def test_a_figure_of_an_earlier_step_is_told_as_one(runs: list[pathlib.Path]) -> None:
    assert "before or after the last step" not in compared(runs)
    evaluated(runs[0], 50.0, protocol="linear", step=50)
    evaluated(runs[1], 40.0, protocol="linear", step=400)
    page = compared(runs)
    assert "linear top-1 was measured before or after the last step that was logged." in page
    assert [cell.split() for cell in rows(page)["linear top-1, %"][:2]] == [
        ["50.0", "46.0–54.0", "step", "50"], ["40.0", "36.0–44.0"],
    ]  # fmt: skip


def test_a_set_may_be_called_untrained(runs: list[pathlib.Path]) -> None:
    evaluated(runs[0], 70.0, variant="on_untrained")
    assert "kNN on untrained top-1, %" in rows(compared(runs))


def test_rates_are_ranked_where_images_and_their_size_are_the_same(tmp_path: pathlib.Path) -> None:
    runs = [make_run(tmp_path / f"run{n}", size=size) for n, size in enumerate((32, 32, 64))]
    for run, rate in zip(runs, (100.0, 200.0, 300.0), strict=True):
        entries = read_metrics(run / "metrics.jsonl")
        write_metrics(run, [each | {"images_per_sec": rate} for each in entries if "loss" in each])
    assert 'best">200</td>' in compared(runs[:2])
    assert 'best">' not in compared(runs)


def test_runs_of_other_images_or_lengths_are_told(runs: list[pathlib.Path]) -> None:
    other = make_run(runs[0].parent / "short", steps=200)
    record = json.loads((other / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps({**record, "data": {"fingerprint": "g"}}), "utf-8")
    page = compared([*runs, other])
    assert "The runs were trained on different images." in page
    assert "The runs have not done the same number of steps." in page
    assert "Over steps." in page


def test_options_that_only_some_methods_have_are_folded(tmp_path: pathlib.Path) -> None:
    runs = [make_run(tmp_path / name, temperature=temperature) for name, temperature in (("a", 0.1), ("b", 0.2))]
    record = json.loads((runs[1] / "config.json").read_text("utf-8"))
    config = {**record["config"], "method": "byol", "predictor_hidden": 512}
    (runs[1] / "config.json").write_text(json.dumps({**record, "config": config}), "utf-8")
    first, rest = compared(runs).split("options that only some of these methods have")
    assert {"--temperature", "--method"} <= {*rows(first)}
    assert rows(rest)["--predictor-hidden"] == ["–", "512"]
    assert "--predictor-hidden" not in rows(first)


def test_losses_of_other_objectives_are_said_to_tell_nothing(tmp_path: pathlib.Path) -> None:
    said = "no lower one is better for it"
    assert said in compared([make_run(tmp_path / f"a{n}", temperature=0.1 * n) for n in (1, 2)])
    assert said not in compared([make_run(tmp_path / f"b{n}", lr=0.1 * n) for n in (1, 2)])


def test_curves_that_show_the_same_are_drawn_once(runs: list[pathlib.Path]) -> None:
    titles = re.findall(r"<figcaption><strong>([^<]*)</strong>", compared(runs))
    assert "Loss" in titles
    assert "Contrast" not in titles


def test_of_many_runs_the_best_are_in_colours(tmp_path: pathlib.Path) -> None:
    runs = [make_run(tmp_path / f"run{n:02d}", steps=40, seed=n) for n in range(14)]
    for number, run in enumerate(runs):
        evaluated(run, 40.0 + number)
    page = compared(runs)
    gray = re.findall(r"--of: var\(--soft\)\">(\d+)<", page)
    assert gray == [str(number) for number in range(1, 7)]
    assert "class='many'" in page


@pytest.mark.parametrize("name", ["report.html", "notes.txt", "a folder"])
def test_only_an_earlier_comparison_is_replaced(
    runs: list[pathlib.Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = runs[0] / name
    assert report.main([str(runs[0])]) == 0
    if name == "notes.txt":
        path.write_text("mine", "utf-8")
    if name == "a folder":
        path.mkdir()
    before = path.read_bytes() if path.is_file() else None
    assert report.main([*map(str, runs), "--out", str(path)]) == 2
    assert f"{path} is there already and is no comparison" in one_line_of(capsys.readouterr().err)
    assert before == (path.read_bytes() if path.is_file() else None)
    compared(runs)
    compared(runs)


def test_a_folder_that_is_no_run_is_one_line(
    runs: list[pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(runs[0]), str(tmp_path / "none")]) == 2
    assert "none is not a run folder" in one_line_of(capsys.readouterr().err)
    assert report.main([str(runs[0]), "--out", "x.html"]) == 2
    assert "--out is for a page that compares several runs" in one_line_of(capsys.readouterr().err)
    assert report.main([]) == 2
    assert "which run? none was given" in one_line_of(capsys.readouterr().err)
