"""A run's own files when they are damaged: one line from whoever reads them, and the rest is kept."""

import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.commands import one_line_of
from support.launch import final_state, train

from fasttrain import evaluate, report
from fasttrain.config import load_config, parse_config
from fasttrain.jobs.report import write_report
from fasttrain.run import checkpoint
from fasttrain.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, saved_checkpoints
from fasttrain.run.evaluations import Evaluation, keep_evaluations
from fasttrain.run.folder import prepare, read_data
from fasttrain.run.metrics import FIGURES, MetricsFile, read_lines, read_metrics
from fasttrain.system.errors import UserError
from fasttrain.system.options import Settings

FILES = "config.json", "metrics.jsonl", "evaluation.json", "samples.png"
MISSING = "missing"
OTHERS = (None, True, -1, 10**30, math.nan, "x", "\ud800", [[1]], {"a": 1}, MISSING)
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "no UTF-8": lambda whole: whole.replace(b"1", b"\xe9"),
    "UTF-16": lambda whole: whole.decode("latin-1").encode("utf-16"),
    "zeros": lambda whole: bytes(5000),
    "a list": lambda whole: b"[1]\n",
    "a number": lambda whole: b"9" * 5000 + b"\n",
    "deep": lambda whole: b"[" * 100_000 + b"\n",
    "twice": lambda whole: 2 * whole,
}


@pytest.fixture(scope="module")
def whole(shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(shards, run, "--max-steps", 3, "--log-every", 1) == 0
    keep_evaluations(run, [Evaluation("knn", 3, False, {"k": 5}, str(shards), "f", 24, 50.0, 49.0, 25.0)])
    return run


@pytest.fixture
def run(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(whole, tmp_path / "run")


def read_by_all(run: pathlib.Path, settings: Settings) -> None:
    """As training that goes on, evaluate.py and report.py read a run folder, without their work."""
    prepare(run, settings, False).close()
    load_config(run)
    read_data(run)
    MetricsFile(run / "metrics.jsonl", 9).close()
    write_report(run)


def in_one_line(read: Callable[[], object]) -> str:
    """The line in which it ends, "" where it does well."""
    try:
        read()
    except (UserError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_a_whole_file_is_one_line_or_none(
    run: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    settings, path = Settings.of(load_config(run)), run / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    line = in_one_line(lambda: read_by_all(run, settings))
    assert (str(path) in line) == (name == "config.json" and damage != "UTF-16")  # which JSON allows
    if not line and damage not in ("empty", "half", "UTF-16", "twice"):
        assert f"warning: {path}" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_never_waited_for(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    needed = name in FILES[:2]
    commands: tuple[Callable[[], int], ...] = (
        lambda: report.main([str(run)]),
        lambda: evaluate.main([str(run), "--knn", "--workers", "1"]),
        lambda: train(shards, run, "--max-steps", 4),
    )
    for command in commands:
        assert (command() != 0) == needed
        errors = capsys.readouterr().err
        assert not needed or f"{run / name}: not a regular file" in one_line_of(errors)
    assert needed or final_state(run)["step"] == 4


def changed(content: dict[str, Any]) -> Iterator[None]:
    """The content with each of its values changed, one after the other, into each of OTHERS."""
    for name in list(content):
        before = dict(content)
        for value in OTHERS:
            content[name] = value
            if value == MISSING:
                del content[name]
            yield
            content.clear()
            content.update(before)


def test_any_value_of_a_config_may_be_of_another_kind(run: pathlib.Path) -> None:
    settings, path = Settings.of(load_config(run)), run / "config.json"
    record = json.loads(path.read_bytes())
    (run / "metrics.jsonl").unlink()  # curves take time
    refused = 0
    for group in (record, record["config"], record["environment"], record["data"]):
        for _ in changed(group):
            path.write_text(json.dumps(record), "utf-8")
            refused += bool(in_one_line(lambda: read_by_all(run, settings)))
    assert refused > 100


@pytest.mark.parametrize("name", ["method", "preset", "optimizer", "size", "resolution"])
def test_settings_to_start_from_may_be_of_another_kind(run: pathlib.Path, name: str) -> None:
    path = run / "config.json"
    record = json.loads(path.read_bytes())
    for value in ([1], -5, {"a": 1}, "none of them", "\ud800"):
        record["config"][name] = value
        path.write_text(json.dumps(record), "utf-8")
        with pytest.raises((UserError, SystemExit)):
            parse_config(["--data", "x", "--config", str(path)])


def test_a_damaged_line_of_metrics_is_left_out_alone_and_counted(
    run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "metrics.jsonl"
    sound = read_metrics(path)
    names = [*sound[0], "knn_top1"]
    bad = [{**sound[0], name: value} for name in names for value in OTHERS[:-1] if name != "loss" and value != -1]
    terms = [name for name in sound[0] if name not in FIGURES]
    bad = [entry for entry in bad if not any(entry[term] is None or entry[term] != entry[term] for term in terms)]
    bad = [entry for entry in bad if 10**30 not in entry.values() or entry["step"] == 10**30]
    lines = [json.dumps(entry).encode() for entry in bad if entry["step"] != 10**30]
    lines += [b"\xff\xfe", b"", b"x" * 200_000, b"[]", json.dumps({"loss": 1.0}).encode(), b"0" * 5000]
    good = [json.dumps(entry).encode() for entry in sound]
    path.write_bytes(b"\n".join([good[0], *lines, *good[1:]]) + b'\n{"step": 9, "lo')
    assert read_lines(path) == (sound, len(lines))
    write_report(run)
    assert f"{len(lines)} damaged line(s) of metrics.jsonl are left out" in (run / "report.html").read_text("utf-8")
    MetricsFile(path, 2).close()
    assert f"warning: {path}: {len(lines)} damaged line(s) left out\n" in capsys.readouterr().err
    assert read_lines(path) == (sound[:2], 0)


def test_odd_names_and_values_are_drawn(run: pathlib.Path) -> None:
    entries = [
        {**entry, "$x$\\frac{": 1e300, "\ud800\0": 3, "none": None, "nan": math.nan, "inf": math.inf}
        for entry in read_metrics(run / "metrics.jsonl")
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), "utf-8")
    assert len(read_metrics(run / "metrics.jsonl")) == 3
    write_report(run)
    assert (run / "report.html").read_text("utf-8").count("<svg") >= 8


def write_sealed(path: pathlib.Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        checkpoint._write_sealed(state, file)


@pytest.mark.parametrize("name", ["format", "step", "config", "data", "method"])
def test_a_checkpoint_with_a_value_of_another_kind_is_damaged(tmp_path: pathlib.Path, name: str) -> None:
    for value in (None, "x" if name != "data" else 5, [], torch.zeros(2), True, -1 if name != "format" else 1.5):
        path = tmp_path / "step-000000001.pt"
        write_sealed(path, {"format": checkpoint.FORMAT, "step": 1, name: value})
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def archive(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return content.getvalue()


@pytest.mark.parametrize(
    "content", [archive("a/b", "\x1b]0;me\x07"), b"c\x1b]0;me\x07\nname\n."], ids=["names", "module"]
)
def test_a_checkpoint_that_quotes_escape_sequences_sends_none_to_the_terminal(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "step-000000001.pt"
    path.write_bytes(content + f"sha256 {hashlib.sha256(content).hexdigest()}\n".encode())
    with pytest.raises(CheckpointError):
        checkpoint.load_newest(tmp_path)
    errors = capsys.readouterr().err.rstrip("\n")
    assert f"{path} can't be read" in errors
    assert errors.isprintable()
    assert "trust" not in errors  # torch says how to run what is in it


@pytest.mark.parametrize("name", ["mean", "std", "method", "optimizer", "skips", "loader"])
def test_a_part_of_a_checkpoint_that_is_of_another_kind_is_one_line_of_training(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    newest = saved_checkpoints(run / "checkpoints")[0]
    state = torch.load(newest, weights_only=True)
    for value in ({"a": 1}, torch.zeros(2)):
        save_checkpoint(run / "checkpoints", {**state, name: value}, 0)
        assert train(shards, run, "--max-steps", 4) == 1
        assert str(newest if name != "method" else newest.parent) in one_line_of(capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a fifo", "device"])
def test_a_checkpoint_that_is_no_file_is_passed_over(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    odd = run / "checkpoints/step-000000007.pt"
    os.mkfifo(run / "fifo")
    {
        "fifo": lambda: os.mkfifo(odd), "folder": odd.mkdir, "link to a fifo": lambda: odd.symlink_to(run / "fifo"),
        "device": lambda: odd.symlink_to("/dev/zero"),
    }[kind]()  # fmt: skip
    assert train(shards, run, "--max-steps", 4) == 0
    errors = capsys.readouterr().err
    assert f"checkpoint {odd} can't be read: not a regular file; trying the one before" in errors
    assert f"continuing {run} from step 3" in errors
    odd.with_name("best.pt").symlink_to(run / "fifo")
    assert evaluate.main([str(run), "--best", "--workers", "1"]) == 1
    assert "best.pt can't be read: not a regular file" in one_line_of(capsys.readouterr().err)


def test_training_ends_well_beside_an_evaluation_that_is_half_written(
    run: pathlib.Path, shards: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "evaluation.json"
    path.write_bytes(path.read_bytes()[:40])
    assert train(shards, run, "--max-steps", 4) == 0
    assert f"warning: {path} is damaged" in capsys.readouterr().err
