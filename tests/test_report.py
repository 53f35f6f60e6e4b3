"""The report of a run whose files are not all as they should be."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import ROOT

from fasttrain.jobs.report import write_report
from fasttrain.run.evaluations import FILE, Evaluation, keep_evaluations
from fasttrain.run.metrics import read_metrics


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record = {"config": {"method": "moco", "arch": "small", "data": "x"}, "environment": {"machine": "a machine"}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    return tmp_path


def written(run: Path) -> str:
    """The run's report, once it is written."""
    write_report(run)
    return (run / "report.html").read_text("utf-8")


def test_an_accuracy_is_never_shown_without_what_guessing_gives(run: Path) -> None:
    evaluations = [
        Evaluation("knn", step, untrained, {"k": 7}, "/data/set", "f", 40, top1, 33.3, 31.0)
        for step, untrained, top1 in ((2, True, 40.0), (2, False, 50.0), (4, False, 60.0))
    ]
    keep_evaluations(run, evaluations)
    figures = write_report(run)
    assert figures["protocol"] == {"knn": {"k": 7}}
    assert (figures["knn_top1"], figures["knn_top1_untrained"], figures["knn_majority"]) == (60.0, 40.0, 31.0)
    page = written(run)
    card = page[page.index("<b>60.0 %</b><span>kNN top-1</span>") :]
    marks = [f"<i class='at {name}'></i>{name}" for name in ("untrained", "majority")]  # as on the card's track
    assert f"<small>{marks[0]} 40.0 · {marks[1]} 31.0 · balanced 33.3</small>" in card[: card.index("</div></div>")]
    assert page.index(">60.0</td>") < page.index(">50.0</td>")  # earlier figures stay, below newer ones


@pytest.mark.parametrize(("top1", "said"), [(60.0, ""), (39.0, "untrained"), (30.0, "untrained and majority")])
def test_an_accuracy_that_training_has_not_raised_is_told_as_one(run: Path, top1: float, said: str) -> None:
    keep_evaluations(
        run, [Evaluation("knn", 2, untrained, {}, "/set", "f", 40, percent, None, 31.0)
              for untrained, percent in ((True, 40.0), (False, top1))],
    )  # fmt: skip
    assert re.findall("<em>(.*?)</em>", written(run)) == ([f"not above {said}"] if said else [])


def test_an_accuracy_of_untrained_weights_alone_is_told_as_one(run: Path) -> None:
    keep_evaluations(run, [Evaluation("knn", 0, True, {"k": 7}, "/data/set", "f", 40, 40.0, 33.3, 31.0)])
    page = written(run)
    assert "<b>40.0 %</b><span>kNN top-1, untrained</span>" in page
    assert "</i>majority 31.0 · balanced 33.3</small>" in page
    assert "not above" not in page


def test_an_accuracy_stands_with_its_interval_and_what_it_was_measured_with(run: Path) -> None:
    settings = {"k": 7, "temperature": 0.07}
    measured = Evaluation("knn", 4, False, settings, "/data/set", "f", 40, 60.0, None, 31.0, 90.0, 52.5, 67.0)
    keep_evaluations(run, [measured, replace(measured, top1=58.0, variant="k10_t0.1")])
    page = written(run)
    assert page.count("<div class='card") == 1  # another k is no headline
    assert (
        "<small>52.5 to 67.0 at 95 %</small><small><i class='at majority'></i>majority 31.0 · top-5 90.0</small>"
        in page
    )
    assert "<small>40 images of set, step 4</small><small>k 7, temperature 0.07</small>" in page
    assert ">kNN k10 t0.1</td>" in page


def test_what_guessing_gives_is_told_of_each_data_set(run: Path) -> None:
    """The newest figures of two protocols may be of two sets."""
    knn = Evaluation("knn", 2, False, {}, "/data/a", "a", 40, 60.0, 60.0, 10.0)
    keep_evaluations(run, [knn, replace(knn, protocol="linear", fingerprint="b", majority=90.0)])
    figures = write_report(run)
    assert (figures["knn_majority"], figures["linear_majority"]) == (10.0, 90.0)


def test_half_an_evaluation_is_left_out_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / FILE).write_text('{"step": 4, "knn_top1": 5')
    assert "kNN" not in written(run)
    assert f"warning: {run / FILE} is damaged" in capsys.readouterr().err


def test_a_full_disk_leaves_the_report_as_it_was(run: Path) -> None:
    """A limit on file size stands for the full disk."""
    before = written(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "report.html").read_text() == before


def test_the_page_of_a_run_with_an_odd_name_is_utf_8_in_any_locale(run: Path, tmp_path: Path) -> None:
    """The name's bytes are no UTF-8."""
    odd = shutil.copytree(run, tmp_path.with_name(f"{tmp_path.name}-odd") / os.fsdecode(b"r\xe9n"))
    own = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, ROOT / "fasttrain/report.py", odd]
    done = subprocess.run(words, capture_output=True, env=own, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"] == str(odd / "report.html")
    assert "<h1>r\\udce9n</h1>" in (odd / "report.html").read_text("utf-8")
