"""Services are told what metrics.jsonl says, once, over all attempts; none of them holds up a run or ends it."""

import json
import math
import pathlib
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.commands import one_line_of
from support.forks import finished, succeed
from support.launch import equal, final_state, train

from fasttrain.run import sinks
from fasttrain.run.checkpoint import saved_checkpoints
from fasttrain.run.metrics import read_metrics
from fasttrain.run.options import LoggingOptions
from fasttrain.run.services import Attempt, Kept, Service
from fasttrain.run.sinks import Aside, check_services, open_sinks
from fasttrain.system.errors import UserError

Curves = dict[str, list[tuple[int, float]]]


def curves_of_metrics(run: pathlib.Path) -> Curves:
    curves: Curves = {}
    for entry in read_metrics(run / "metrics.jsonl"):
        for name, value in entry.items():
            if name != "step" and value is not None:
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def curves_of_tensorboard(run: pathlib.Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def records(path: pathlib.Path) -> Iterator[bytes]:
    """Those of a file of W&B, which is LevelDB's log: blocks of 32 KiB, and parts of records of which each says its
    checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", content, place)
        part = content[place + 7 : place + 7 + length]
        place += 7 + length
        record = part if kind in (1, 2) else record + part
        if kind in (1, 4):
            yield record


def curves_of_wandb(run: pathlib.Path) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = {}
    ids = set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):  # their names begin with their times
        ids.add(path.stem)
        for content in records(path):
            record = Record()
            record.ParseFromString(content)
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name in row:
                if name != "step" and not name.startswith("_"):
                    curves.setdefault(name, []).append((row["step"], row[name]))
    assert ids == {f"run-{json.loads((run / 'wandb-run.json').read_text())['id']}"}
    return curves


def curves_of_mlflow(run: pathlib.Path) -> Curves:
    from mlflow import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("of ours").experiment_id])
    assert found.info.run_name == run.name
    assert found.info.status == "FINISHED"
    assert found.data.params["method"] == "xmoco"
    assert len(found.data.params) == len(json.loads((run / "config.json").read_text())["config"])
    names = found.data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)] for name in names}


@pytest.fixture
def services(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they keep lies in the test's folder, and nobody is called."""
    values = {
        "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_DISABLE_GIT": "true", "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_TRACKING_URI": f"file:{tmp_path / 'mlflow'}",
        "MLFLOW_EXPERIMENT_NAME": "of ours", "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip
    folders = {f"WANDB_{name}_DIR": str(tmp_path / "wandb") for name in ("CACHE", "CONFIG", "DATA")}
    for name, value in (values | folders).items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "curves"),
    [("tensorboard", curves_of_tensorboard), ("wandb", curves_of_wandb), ("mlflow", curves_of_mlflow)],
)
@pytest.mark.usefixtures("services")
def test_a_service_has_the_figures_of_metrics_once_also_of_a_run_that_lost_steps(
    shards: pathlib.Path, tmp_path: pathlib.Path, name: str, curves: Callable[[pathlib.Path], Curves]
) -> None:
    pytest.importorskip(name)
    run, command = tmp_path / "run", ("--knn-every", 1, "--epochs", 2, f"--{name}")  # 4 steps an epoch
    for more in (("--max-steps", 6, "--checkpoint-every", 4), ()):
        succeed([finished(tmp_path, train, shards, run, *command, *more)])
        if more:
            saved_checkpoints(run / "checkpoints")[0].unlink()  # as if it had ended before this was written
    expected, found = curves_of_metrics(run), curves(run)
    assert {"loss", "cross", "lr", "knn_top1", "skipped"} <= set(expected) == set(found)
    assert [step for step, _ in found["knn_top1"]] == [4, 8]
    for of_name, points in expected.items():
        steps, values = zip(*points, strict=True)
        found_steps, found_values = zip(*found[of_name], strict=True)
        assert found_steps == steps, of_name
        if of_name not in ("images_per_sec", "data_wait", "transfer_wait", "views_time", "rss_gib"):  # of step 6 twice
            assert found_values == pytest.approx(values, rel=1e-6), of_name


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_one_line_before_the_run_folder_is_touched(
    shards: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.setitem(sys.modules, sinks.SERVICES[name][1], None)
    assert train(shards, tmp_path / "run", f"--{name}") == 2
    line = one_line_of(capsys.readouterr().err)
    assert f"--{name} needs the {name}" in line
    assert "pip install " in line
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("services")
def test_a_place_for_mlflow_that_can_not_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    with pytest.raises(UserError, match=r"^--mlflow: .*nowhere"):
        check_services(LoggingOptions(mlflow=True))


def _without_a_key() -> None:
    with pytest.raises(UserError, match=r"^--wandb: .*key.*WANDB_MODE=offline"):
        check_services(LoggingOptions(wandb=True))


@pytest.mark.usefixtures("services")
def test_wandb_without_a_key_is_one_line_and_asks_for_none(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("wandb")
    succeed([finished(tmp_path, _without_a_key, WANDB_MODE="online", HOME=tmp_path, NETRC=tmp_path / "none")])


class Listener:
    """A service that does as it is told."""

    def __init__(self, at_opening: Callable[[], Any] = int, at_writing: Callable[[], Any] = int) -> None:
        at_opening()
        self.at_writing, self.told, self.closed = at_writing, [], False

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.at_writing()
        self.told.append((step, figures))

    def close(self) -> None:
        self.closed = True


def fails() -> None:
    raise ConnectionError("no\nnetwork \x1b[1m")


def test_what_is_told_are_finite_figures_and_all_of_them_when_it_is_closed() -> None:
    service = Listener()
    aside = Aside("x", lambda: service)
    aside.write({"step": 1, "loss": 2.5, "cross": None, "lr": math.inf})
    aside.event({"step": 2, "knn_top1": 50.0, "histogram_positive": [1, 2]})
    aside.close()
    assert service.told == [(1, {"loss": 2.5}), (2, {"knn_top1": 50.0})]
    assert service.closed


@pytest.mark.parametrize("place", ["at_opening", "at_writing"])
def test_one_that_fails_is_left_with_one_line(capsys: pytest.CaptureFixture[str], place: str) -> None:
    aside = Aside("wandb", lambda: Listener(**{place: fails}))
    for step in (1, 2):
        aside.write({"step": step, "loss": 1.0})
    aside._thread.join(10)
    aside.write({"step": 3, "loss": 1.0})
    aside.close()
    assert capsys.readouterr().err == (
        "warning: the run goes on without --wandb: ConnectionError: no network \\x1b[1m\n"
    )


def test_one_that_would_end_the_program_is_left_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    aside = Aside("wandb", lambda: Listener(at_opening=sys.exit))
    aside._thread.join(10)
    aside.close()
    assert capsys.readouterr().err == "warning: the run goes on without --wandb: SystemExit: \n"


def test_one_that_hangs_holds_up_neither_a_step_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.01)
    monkeypatch.setattr(sinks, "MOST_WAITING", 5)
    end = threading.Event()
    try:
        for count, why in ((3, "it has not taken the last figures in 0.01 s"), (7, "5 entries wait for it")):
            aside = Aside("mlflow", lambda: Listener(at_opening=end.wait))
            for step in range(count):
                aside.write({"step": step})
            aside.close()
            assert capsys.readouterr().err == f"warning: the run goes on without --mlflow: {why}\n"
    finally:
        end.set()


def test_training_ends_well_and_as_without_where_a_service_fails(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = types.ModuleType("there")
    monkeypatch.setitem(sys.modules, "there", package)
    monkeypatch.setitem(sinks.SERVICES, "mlflow", (lambda _attempt: Listener(at_writing=fails), "there", "there"))
    assert train(shards, tmp_path / "with", "--max-steps", 4, "--mlflow") == 0
    assert capsys.readouterr().err.count("goes on without --mlflow") == 1
    assert train(shards, tmp_path / "without", "--max-steps", 4) == 0
    assert equal(final_state(tmp_path / "with"), final_state(tmp_path / "without")) == []
    assert len(read_metrics(tmp_path / "with/metrics.jsonl")) == 2


def test_what_earlier_attempts_have_told_is_what_is_kept(tmp_path: pathlib.Path) -> None:
    """Killed at 100, then at 60, each time back to 50: told up to 100. One that is new there is told all."""
    path = tmp_path / "x-run.json"
    for step, reached, until in ((0, 0, 0), (50, 100, 100), (50, 60, 100)):
        kept = Kept.read(path, Attempt(tmp_path, step, reached, {}))
        assert kept.until == until
        kept._replace(id="a").write(path)
    assert [step for step in (50, 51, 100, 101) if kept.lacks(step)] == [50, 101]
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"x-run.json is damaged: without it the run is a new one there"):
        Kept.read(path, Attempt(tmp_path, 50, 100, {}))
    new = Kept.read(tmp_path / "y-run.json", Attempt(tmp_path, 50, 100, {}))
    assert (new.id, new.lacks(51)) == ("", True)


def test_the_services_that_are_asked_for_are_told_where_the_attempt_before_ended(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def opened(attempt: Attempt) -> Service:
        attempts.append(attempt)
        return Listener()

    monkeypatch.setitem(sinks.SERVICES, "wandb", (opened, "", ""))
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n{"step": 9}\n')
    for sink in open_sinks(tmp_path, 5, LoggingOptions(wandb=True), {"lr": 1}):
        sink.close()
    assert attempts == [Attempt(tmp_path, 5, 9, {"lr": 1})]
