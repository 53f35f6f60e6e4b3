"""The representation's health while training: what is measured and when, that training does not notice, restarts."""

import itertools
import os
import pathlib
import shutil
import signal
from typing import Any

import numpy as np
import pytest
import torch
from support.forks import succeed
from support.launch import equal, final_state, train, train_on_ranks
from support.steps import build, small

from fasttrain.config import make_config
from fasttrain.evaluation import health
from fasttrain.evaluation.collapse import collapse
from fasttrain.evaluation.health import BINS, HealthMonitor, of_pairs, spectral
from fasttrain.evaluation.health_events import LEAST, MOST, PART, PASSES, plan
from fasttrain.input import located
from fasttrain.methods import METHODS
from fasttrain.run.ending import ending_of
from fasttrain.run.metrics import read_metrics
from fasttrain.system.errors import UserError
from fasttrain.views.spec import RECIPES

CPU = torch.device("cpu")
LABEL_FREE = {
    "rankme", "effective_rank", "feature_std", "alpha_req", "std", "projection_std", "alignment", "uniformity",
    "histogram_positive", "histogram_negative",
}  # fmt: skip
LABELLED = {"subset_knn_top1", "subset_knn_majority"}


def events(run: pathlib.Path) -> dict[int, dict[str, Any]]:
    found = [entry for entry in read_metrics(run / "metrics.jsonl") if "rankme" in entry]
    assert len({entry["step"] for entry in found}) == len(found)
    return {entry["step"]: {k: v for k, v in entry.items() if k not in ("step", "epoch")} for entry in found}


def test_events_are_at_the_first_step_every_so_many_and_the_last_and_training_does_not_notice(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    measured, plain = tmp_path / "measured", tmp_path / "plain"
    assert train(shards, measured, "--health-every", 6, "--lidar") == 0
    assert train(shards, plain, "--health-every", 0) == 0
    assert equal(final_state(measured), final_state(plain)) == []
    found = events(measured)
    assert list(found) == [0, 6, 12, 16]
    assert events(plain) == {}
    for figures in found.values():
        assert set(figures) | {"alpha_req"} == LABEL_FREE | LABELLED | {"lidar", "compactness", "compactness_low"}
        assert len(figures["histogram_positive"]) == BINS
        assert sum(figures["histogram_positive"]) == 72 / health.PAIRED
        assert sum(figures["histogram_negative"]) == 18 * 17
    assert found[0] != found[16]


def test_a_run_that_goes_on_measures_what_it_would_have_and_nothing_twice(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = ["--health-every", 4]
    assert train(shards, whole, *words) == 0
    for stop in (4, 10):  # one of the steps that are measured, and one that is not
        assert train(shards, run, *words, "--max-steps", stop) == 0
    assert train(shards, run, *words) == 0
    found = events(run)
    del found[10]  # the last one of a process
    assert found == events(whole)
    assert equal(final_state(whole), final_state(run)) == []


def test_an_event_that_a_signal_cut_short_is_made_up_for(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run, words = tmp_path / "whole", tmp_path / "run", ["--health-every", 4]
    assert train(shards, whole, *words) == 0
    looked = itertools.count()  # once in each split of an event
    real = health.center

    def centre(*words: Any) -> Any:
        if next(looked) == 4:  # the train split of the third event
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*words)

    monkeypatch.setattr(health, "center", centre)
    assert train(shards, run, *words) == 143
    assert final_state(run)["step"] == 8
    assert list(events(run)) == [0, 4]
    assert train(shards, run, *words) == 0
    assert events(run) == events(whole)
    assert equal(final_state(whole), final_state(run)) == []


def test_one_that_was_due_when_the_run_was_killed_is_made_up_for(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, words = tmp_path / "run", ["--health-every", 8]
    assert train(shards, run, "--max-steps", 8, "--health-every", 0) == 0
    assert events(run) == {}
    assert train(shards, run, *words) == 0
    assert list(events(run)) == [8, 16]


def test_without_labels_or_val_split_there_is_what_needs_none(
    image_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for place, name in ((image_folder / "train" / "class1", "unlabelled"), (image_folder / "val", "no val")):
        assert train(place, tmp_path / name, "--health-every", 1, "--max-steps", 1) == 0
        for figures in events(tmp_path / name).values():
            assert set(figures) | {"alpha_req"} == LABEL_FREE


@pytest.mark.parametrize("images", [2, 3, 5])
def test_a_set_of_a_few_images_has_figures(image_folder: pathlib.Path, tmp_path: pathlib.Path, images: int) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, image in enumerate(sorted((image_folder / "train").rglob("*.jpg"))[:images]):
        shutil.copy(image, data / f"{number}.jpg")
    words = ["--health-every", 1, "--lidar", "--batch-size", 2, "--batch-norm", "plain", "--max-steps", 1]
    assert train(data, tmp_path / "run", *words) == 0
    assert list(events(tmp_path / "run")) == [0, 1]
    assert all(None not in figures.values() for figures in events(tmp_path / "run").values())


def test_two_ranks_have_one_rank_s_figures(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ["--health-every", 4, "--batch-norm", "sync", "--online-probe", "--max-steps", 4, "--lr", 0.01]
    assert train(shards, tmp_path / "one", *words) == 0
    succeed(train_on_ranks(tmp_path, 2, shards, tmp_path / "two", *words))
    one, two = events(tmp_path / "one"), events(tmp_path / "two")
    assert one[0] == two[0]
    for name in ("rankme", "std", "alignment", "uniformity"):
        assert two[4][name] == pytest.approx(one[4][name], rel=0.02)
    assert "probe_top1" in two[4]


@pytest.mark.parametrize("method", METHODS)
def test_figures_are_a_function_of_the_weights_and_leave_no_trace(shards: pathlib.Path, method: str) -> None:
    config = small(method, data=str(shards))
    model = build(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    recipe = config.recipe
    monitor = HealthMonitor(located(config.data.data), config.data, recipe, 16, 0, 24, True, CPU, 1)
    found = [monitor(model, None, (0.5,) * 3, (0.5,) * 3, lambda: None) for _ in range(2)]
    assert found[0] == found[1]
    assert {name for name in found[0] if found[0][name] != found[0][name]} == set()
    assert 1 <= float(found[0]["rankme"]) <= 24  # type: ignore[arg-type]
    assert all(module.training for module in model.modules())
    assert equal(before, dict(model.state_dict())) == []
    assert torch.equal(random_state, torch.get_rng_state())


def test_the_pairs_are_the_same_images_and_views_whatever_the_batches(
    shards: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(data=str(shards), batch_norm="plain")
    model, found = build(config), []
    for batch_size in (8, 128):
        monkeypatch.setattr(health, "BATCH_SIZE", batch_size)
        monitor = HealthMonitor(located(config.data.data), config.data, RECIPES["mocov2"], 16, 0, 72, False, CPU, 1)
        found.append(monitor(model, None, (0.5,) * 3, (0.5,) * 3, lambda: None))
    for name in ("rankme", "std", "alignment", "uniformity", "subset_knn_top1"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


def test_a_collapsed_and_an_even_representation_have_the_figures_they_are_named_for() -> None:
    one = torch.ones(40, 8)
    assert spectral(one)["rankme"] == pytest.approx(1, abs=1e-3)
    assert spectral(one)["feature_std"] == pytest.approx(0, abs=1e-5)
    flat = of_pairs(one, one)
    assert (flat["std"], flat["uniformity"]) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5))
    assert flat["histogram_negative"] == [0] * (BINS - 1) + [40 * 39]
    even = torch.eye(8).repeat(1, 1)
    assert spectral(even)["rankme"] == pytest.approx(8, abs=1e-3)
    found = of_pairs(even, even)
    assert found["alignment"] == pytest.approx(0, abs=1e-6)
    positive, negative = (np.array(found[f"histogram_{side}"]) for side in ("positive", "negative"))
    assert positive[-1] == 8
    assert negative[BINS // 2] == 8 * 7  # cosines of 0


@pytest.mark.parametrize("recipe", ["mocov2", "swav"])
@pytest.mark.parametrize("steps", [1, 90, 400, 5_000, 100_000, 10**6])
@pytest.mark.parametrize("ranks", [1, 8])
def test_auto_keeps_to_its_part_of_a_run(recipe: str, steps: int, ranks: int) -> None:
    """In passes of an image: a step takes at least one with its backward, and one of each other view."""
    for batch_size in (16, 256, 4096):
        every, images, _ = plan("auto", steps, batch_size, RECIPES[recipe], ranks)
        assert LEAST <= images <= MOST
        if every:
            events = 1 + -(-steps // every)
            area = sum(spec.count * spec.size**2 for spec in RECIPES[recipe])
            assert events >= 2
            part = PART * steps * batch_size * (2 + area)
            assert events * PASSES * images * ranks <= part or (events == 2 and events * PASSES * images <= part)
        else:
            assert steps * batch_size <= 32_000


@pytest.mark.parametrize("asked", ["auto", 10])
@pytest.mark.parametrize("steps", [400, 5_000, 10**6])
def test_images_do_not_follow_from_the_number_of_ranks(asked: Any, steps: int) -> None:
    one, *more = (plan(asked, steps, 256, RECIPES["mocov2"], ranks) for ranks in (1, 2, 3, 8, 64))
    assert one.every > 0
    for other in more:
        assert (other.images, other.young) == (one.images, one.young)
        assert one.every <= other.every <= steps


def test_what_needs_events_has_them_and_is_refused_without() -> None:
    assert plan("auto", 16, 16, RECIPES["mocov2"], 1, needs=True).every == 16
    with pytest.raises(UserError, match="--health-every, which is 0"):
        plan(0, 16, 16, RECIPES["mocov2"], 1, needs=True)


def test_images_of_val_that_can_t_be_read_do_not_end_training(
    image_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    for image in (data / "val").rglob("*.jpg"):
        image.write_bytes(image.read_bytes()[:200])
    assert train(data, tmp_path / "run", "--health-every", 8) == 0
    assert "the representation is not looked at: " in capsys.readouterr().err
    assert events(tmp_path / "run") == {}


def test_what_is_asked_for_is_kept_to_and_larger_runs_have_more_images() -> None:
    assert plan(0, 1000, 64, RECIPES["mocov2"], 1).every == 0
    few, many = (plan(7, steps, 256, RECIPES["mocov2"], 1) for steps in (70, 700_000))
    assert (few.every, many.every) == (7, 7)
    sizes = [plan("auto", steps, 256, RECIPES["mocov2"], 1).images for steps in (100, 10_000, 10**6)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == MOST


def test_the_demo_has_events_by_itself() -> None:
    config = make_config(preset="demo", data="x")
    steps = config.optimisation.epochs * (2400 // config.optimisation.batch_size)
    recipe = config.recipe
    every, *_ = plan(config.logging.health_every, steps, config.optimisation.batch_size, recipe, 1)
    assert 0 < every <= steps / 2


HEALTHY = {"uniformity": -2.5, "feature_std": 0.55, "std": 0.9, "rankme": 48.0, "projection_std": 0.01}


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({}, ""),
        ({"uniformity": -0.01, "std": 0.03}, ""),  # of a head without batch norm, whose encoder is sound
        ({"feature_std": 0.3}, ""),
        ({"uniformity": -0.01, "std": 0.03, "feature_std": 0.3}, "uniformity -0.010"),
        ({"uniformity": float("nan"), "feature_std": float("nan")}, "uniformity nan"),
        ({"rankme": 1.3}, "RankMe 1.30"),
        ({"rankme": float("nan")}, "RankMe nan"),
    ],
)
def test_a_collapse_is_told_by_what_healthy_runs_do_not_have(figures: dict[str, float], said: str) -> None:
    line = collapse({**HEALTHY, **figures, "histogram_positive": [1]}, small("byol").method)
    assert bool(line) == bool(said)
    assert said in line
    assert not line or "an --ema nearer to 1" in line


def test_a_loss_that_asks_for_a_spread_of_1_has_collapsed_far_below_it() -> None:
    assert "shrunk to a standard deviation of 0.010" in collapse(HEALTHY, small("vicreg").method)
    assert collapse({**HEALTHY, "projection_std": 0.8}, small("vicreg").method) == ""


def test_no_collapse_is_found_before_running_statistics_have_come_to_the_weights() -> None:
    """Healthy demos of six methods had the figures of one at steps 10 and 20, whatever part of a run that is."""
    assert plan(10, 37, 64, RECIPES["mocov2"], 1).young >= 50
    assert plan(10, 10_000, 64, RECIPES["mocov2"], 1).young == 1000


COLLAPSING = (
    "--method", "moco", "--lr", "3000", "--precision", "fp32", "--epochs", "15", "--health-every", "25",
)  # fmt: skip


def test_a_collapse_is_said_once_and_the_run_goes_on(
    shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, tmp_path / "run", *COLLAPSING) == 0
    assert capsys.readouterr().err.count("collapse: ") == 1
    assert final_state(tmp_path / "run")["step"] == 60


def test_a_collapse_ends_the_run_where_that_is_asked_for(
    shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [*COLLAPSING, "--checkpoint-every", 10, "--keep-last", 0]
    for _attempt in range(2):  # the second finds what the first has measured, and does not train on
        assert train(shards, run, *words, "--stop-on-collapse") == 1
        said = capsys.readouterr().err
        assert final_state(run)["step"] == 50
        assert list(events(run)) == [0, 25, 50]
        assert len(list((run / "checkpoints").iterdir())) == 5  # the older ones stay
        assert said.splitlines()[-1].endswith("(--stop-on-collapse)")
        assert "Traceback" not in said
        ending = ending_of(run, {})
        assert (ending.state, ending.step) == ("failed", 50)
        assert ending.line.endswith("(--stop-on-collapse)")
        assert "failed at step 50: collapse: " in (run / "report.html").read_text()
    assert train(shards, run, *words) == 0
    assert final_state(run)["step"] == 60


def test_all_ranks_end_alike_when_a_collapse_is_found(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = [*COLLAPSING, "--stop-on-collapse", "--batch-norm", "plain"]
    done = train_on_ranks(tmp_path, 2, shards, tmp_path / "run", *words)
    assert [each.returncode for each in done] == [1, 1]
    assert [each.stderr.count("--stop-on-collapse") for each in done] == [1, 0]
