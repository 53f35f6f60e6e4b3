"""What a run's page says, of a run that has all there may be."""

import json
import pathlib
import re
from dataclasses import replace

import numpy as np
import pytest
from support.runs import ended, entry, evaluated, make_run, scores, write_metrics

from fasttrain.jobs.report import write_report
from fasttrain.page.curves import training
from fasttrain.page.history import History
from fasttrain.page.shell import text
from fasttrain.run.evaluations import keep_evaluations, read_evaluations
from fasttrain.run.metrics import read_metrics
from fasttrain.run.summary import summary


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    return make_run(tmp_path / "run")


def page_of(run: pathlib.Path) -> str:
    write_report(run)
    return (run / "report.html").read_text("utf-8")


def titles(page: str) -> list[str]:
    return re.findall(r"<figcaption><strong>([^<]*)</strong>", page)


def changed(run: pathlib.Path, **values: object) -> None:
    """Other values in config.json."""
    record = json.loads((run / "config.json").read_text("utf-8"))
    (run / "config.json").write_text(json.dumps({**record, **values}), "utf-8")


def test_a_term_that_equals_another_is_named_and_not_drawn(run: pathlib.Path) -> None:
    page = page_of(run)
    assert "Left out: contrast, the same as loss." in page
    assert "Contrast" not in titles(page)
    assert {"Loss", "Cross", "Contrastive accuracy, %", "Similarity of query and key"} <= {*titles(page)}


def test_a_term_that_never_moves_is_told_in_words(run: pathlib.Path) -> None:
    write_metrics(run, [{**each, "cross": 0.25} for each in read_metrics(run / "metrics.jsonl")])
    page = page_of(run)
    assert "cross, 0.25 throughout" in page
    assert "Cross" not in titles(page)


def test_the_queue_is_shown_while_it_fills(run: pathlib.Path) -> None:
    assert 'aria-label="Queue filled, % over steps: from 10 to 100"' in page_of(run)
    entries = [{**each, "queue_filled": 1.0} for each in read_metrics(run / "metrics.jsonl")]
    write_metrics(run, entries)
    assert "Queue filled, %" not in titles(page_of(run))


def test_scores_are_drawn_as_they_were_spread_at_some_steps(run: pathlib.Path) -> None:
    history = replace(History.read(run), events=[scores(step, 400) for step in range(10, 401, 10)])
    page = training(history)
    assert "Scores over training" in titles(page)
    assert "at 7 steps of training" in page
    damaged = [{**scores(10, 400), "histogram_positive": value} for value in (None, 5, ["x"], [-1.0], [[1]], [1, 2])]
    assert "Scores over training" not in titles(training(replace(history, events=damaged)))


def test_a_loss_that_was_never_a_number_has_a_page_all_the_same(run: pathlib.Path) -> None:
    entries = read_metrics(run / "metrics.jsonl")
    write_metrics(run, [{**each, "loss": None} if "loss" in each else each for each in entries])
    assert "<h1>" in page_of(run)


def test_a_figure_of_the_projection_stands_beside_the_encoders(run: pathlib.Path) -> None:
    """Which stays what the run is known by."""
    evaluated(run, 60.0, settings={"features": "encoder", "k": 20})
    evaluated(run, 90.0, settings={"features": "projection", "k": 20})
    figures = write_report(run)
    assert (figures["knn_top1"], figures["protocol"]["knn"]["features"]) == (60.0, "encoder")
    page = (run / "report.html").read_text("utf-8")
    assert page.index("<b>60.0 %</b><span>kNN top-1</span>") < page.index("<span>kNN top-1 of the projection</span>")
    knn = summary(run).knn
    assert knn is not None
    assert knn.top1 == 60.0


def test_untrained_weights_are_compared_with_what_was_measured_alike(run: pathlib.Path) -> None:
    evaluated(run, 35.0, settings={"k": 200})
    keep_evaluations(run, [replace(read_evaluations(run)[0], top1=20.0, settings={"k": 20})])
    (card,) = (each for each in page_of(run).split("<div class='card")[1:] if "<b>20.0 %</b>" in each)
    assert "untrained 25.0" not in card.split("</section>")[0]


def test_steps_that_differ_are_told_of_each_figure(run: pathlib.Path) -> None:
    evaluated(run, 60.0, step=400, protocol="linear")
    evaluated(run, 58.0, step=250)
    figures = write_report(run)
    assert figures["step"] == 400
    assert figures["protocol"]["knn"]["step"] == 250
    assert "step" not in figures["protocol"]["linear"]


def test_what_was_measured_once_is_told_and_not_drawn(tmp_path: pathlib.Path) -> None:
    page = page_of(make_run(tmp_path / "run", steps=8, every=8))
    loss = page[page.index("<strong>Loss") :].split("</figure>")[0]
    assert re.search(r"<b>[\d.]+</b> <small>at step 8</small>", loss)
    assert "<svg" not in loss
    assert "<svg" in page[page.index("<strong>Rank of the features") :].split("</figure>")[0]


def test_ranks_that_look_the_same_are_one_curve(run: pathlib.Path) -> None:
    entries = read_metrics(run / "metrics.jsonl")
    assert "Left out: effective" not in page_of(run)
    write_metrics(
        run, [each | {"effective_rank": 0.999 * each["rankme"]} if "rankme" in each else each for each in entries]
    )
    assert "Left out: effective, the same as RankMe within 1 %." in page_of(run)


def test_how_many_entries_there_are_is_said_in_whole_words(tmp_path: pathlib.Path) -> None:
    assert "One entry, of step 8." in page_of(make_run(tmp_path / "one", steps=8, every=8))
    assert "9 entries, one for each step." in page_of(make_run(tmp_path / "nine", steps=9, every=1))


def test_the_spread_of_features_stands_beside_that_of_projections(run: pathlib.Path) -> None:
    entries = read_metrics(run / "metrics.jsonl")
    write_metrics(
        run, [each | {"feature_std": 0.5, "projection_std": 0.9} if "std" in each else each for each in entries]
    )
    page = page_of(run)
    assert re.search(r'aria-label="Standard deviation of a dimension over steps: projections [^"]*; features ', page)
    assert "Standard deviation of the projections" not in titles(page)
    config = json.loads((run / "config.json").read_text("utf-8"))["config"]
    changed(run, config={**config, "variance_weight": 25.0})
    assert "Standard deviation of the projections" in titles(page_of(run))


def test_events_stand_in_the_curves(tmp_path: pathlib.Path) -> None:
    run = make_run(tmp_path / "run", resolution="16:32")
    history = History.read(run)
    assert (200, "resumed") in history.marks()
    assert [name for _, name in history.marks() if name.endswith("px")] == ["24 px", "32 px"]
    assert history.skipped_steps() == [250]
    assert "Steps were skipped, as they were not finite, before step 250." in page_of(run)


def test_steps_are_told_in_epochs_and_hours(run: pathlib.Path) -> None:
    history = History.read(run)
    assert history.steps_per_epoch() == 20
    assert history.scale().epoch(400) == 20
    assert history.scale().hours(400) == pytest.approx(400 * 128 / 803 / 3600, rel=0.01)
    assert history.planned_steps() == 24 * 20
    changed(run, steps={"last": 440, "per_epoch": 10})
    assert (History.read(run).steps_per_epoch(), History.read(run).planned_steps()) == (10, 440)
    changed(run, steps={"last": "x", "per_epoch": -5})
    assert (History.read(run).steps_per_epoch(), History.read(run).planned_steps()) == (20, 480)
    assert "<dd>400 of 480</dd>" in page_of(run)


def test_waiting_is_told_with_what_to_change(run: pathlib.Path) -> None:
    assert "In the newer half of the run, 30% of the time the step waits for decoding" in page_of(run)
    write_metrics(run, [{**each, "data_wait": 0.05} for each in read_metrics(run / "metrics.jsonl") if "loss" in each])
    assert "class=advice" not in page_of(run)


def test_settings_that_differ_from_the_preset_stand_first(tmp_path: pathlib.Path) -> None:
    page = page_of(make_run(tmp_path / "run", temperature=0.31, arch="vit_tiny"))
    first, rest = page[page.index("<h2>Settings") :].split("all settings", 1)
    assert "<dt>--temperature</dt><dd>0.31<small>instead of 0.1</small>" in first
    assert "<dt>--arch</dt><dd>vit_tiny<small>instead of small</small>" in first
    assert "<dt>--optimizer" not in first
    assert "<dt>queue size</dt>" in rest


def test_a_method_from_outside_is_not_run_for_its_defaults(run: pathlib.Path) -> None:
    config = json.loads((run / "config.json").read_text("utf-8"))["config"]
    changed(run, config={**config, "method": "no.such.module:Class"})
    page = page_of(run)
    assert "only its own code knows" in page
    assert "<dt>method</dt><dd>no.such.module:Class</dd>" in page


def test_settings_of_an_old_run_are_not_said_to_be_of_others_code(run: pathlib.Path) -> None:
    config = json.loads((run / "config.json").read_text("utf-8"))["config"]
    changed(run, config={name: value for name, value in config.items() if name != "preset"})
    assert "No preset is recorded." in page_of(run)


def test_how_it_was_run_is_told(run: pathlib.Path) -> None:
    page = page_of(run)
    for said in ("<dt>processes</dt><dd>2</dd>", "<dd>0123456789ab-dirty</dd>", "<dd>2030-01-02 03:04:05+0000</dd>",
                 "<pre>fasttrain/train.py --preset demo --data /images</pre>", "started 2 times"):  # fmt: skip
        assert said in page


@pytest.mark.parametrize(
    ("state", "line", "said"),
    [
        ("done", "", "<p class='state good'>done at step 400, 2030-01-02 04:04:05+0000</p>"),
        ("stopped", "by SIGTERM", "<p class='state '>stopped by SIGTERM at step 400, 2030"),
        ("failed", "disk <full>", "<p class='state bad'>failed at step 400: disk &lt;full&gt;, 2030"),
    ],
)
def test_how_the_run_ended_stands_on_top(run: pathlib.Path, state: str, line: str, said: str) -> None:
    ended(run, state, line)
    assert said in page_of(run)


def test_a_run_that_was_killed_is_told_as_one(run: pathlib.Path) -> None:
    assert "class='state" not in page_of(run)  # nothing is known
    changed(run, steps={"last": 480, "per_epoch": 20})
    assert "<p class='state bad'>killed: " in page_of(run)


def test_other_runs_of_the_same_images_stand_beside_it(run: pathlib.Path) -> None:
    evaluated(run, 60.0)
    better, other, bare = (make_run(run.parent / name, steps=20) for name in ("better & <b>", "other", "bare"))
    evaluated(better, 80.0)
    write_report(better)
    evaluated(other, 90.0)
    changed(other, data={"fingerprint": "g"})
    (bare / "config.json").write_bytes(b"{")
    make_run(run.parent / "never-evaluated", steps=20)
    page = page_of(run)
    part = page[page.index("<h2>Other runs of the same images") : page.index("<h2>Training")]
    assert '<a href="../better%20%26%20%3Cb%3E/report.html">better &amp; &lt;b&gt;</a>' in part
    assert 'best">80.0</td>' in part
    assert "60.0" in part
    assert "90.0" not in part
    assert "never-evaluated" not in part


def test_what_guessing_and_untrained_weights_give_are_lines_beside_the_accuracy(run: pathlib.Path) -> None:
    evaluated(run, 70.0)
    assert re.search(r'aria-label="top-1 accuracy[^"]*untrained 25; majority 10"', page_of(run))


def test_a_run_of_many_entries_has_a_page_of_bounded_size(run: pathlib.Path) -> None:
    entries = [json.dumps(each) for each in read_metrics(run / "metrics.jsonl") if "loss" in each]
    assert entries
    few = len(page_of(run))
    drawn = np.random.default_rng(0)
    write_metrics(run, [entry(step, 100_000, drawn) for step in range(10, 100_001, 10)])
    assert len(page_of(run)) < few + 300_000


def test_the_shuffle_that_was_taken_is_told_whatever_was_asked_for(run: pathlib.Path) -> None:
    words = "<dt>shuffle of the images</dt><dd>block, 64 shards at once</dd>"
    assert words in page_of(run)
    record = json.loads((run / "config.json").read_text("utf-8"))
    earlier = [{name: value for name, value in each.items() if name != "shuffle"} for each in record["starts"]]
    changed(run, starts=earlier)
    assert "shuffle</dt><dd>block" not in page_of(run)


@pytest.mark.parametrize("start", ["\"'>", ""])
def test_no_word_of_a_run_folder_becomes_markup(start: str, tmp_path: pathlib.Path) -> None:
    odd = f"{start}<img src=x onerror=alert(1)>"
    run = make_run(tmp_path / odd)
    record = json.loads((run / "config.json").read_text("utf-8"))
    config = {name: odd if isinstance(value, str) else value for name, value in record["config"].items()}
    starts = [{**each, "command": odd, "commit": odd, "time": odd, "shuffle": odd} for each in record["starts"]]
    changed(run, config={**config, odd: odd}, environment={odd: odd, "machine": odd}, starts=starts,
            init={"source": odd, "digest": odd}, data={"fingerprint": odd})  # fmt: skip
    write_metrics(run, [{**each, odd: 1 / each["step"]} for each in read_metrics(run / "metrics.jsonl")])
    evaluated(run, protocol=odd, variant=odd, settings={odd: odd}, data=odd)
    evaluated(run, settings={odd: odd}, data=odd)
    ended(run, "failed", odd)
    page = page_of(run)
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") > 20


def test_words_from_files_are_no_markup_and_never_unprintable() -> None:
    assert text('<b a="\n\x00\ud800">') == "&lt;b a=&quot;\\n\\x00\\ud800&quot;&gt;"
