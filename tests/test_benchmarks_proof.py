"""Cases of a comparison are trained once for each seed, and its tables say what was kept of them."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
from typing import Any

import pytest

from benchmarks import proof, proof_tables, record
from benchmarks.proof import ProofCase
from fasttrain import open_dataset
from fasttrain.config import parse_config
from fasttrain.system.cli import parse
from fasttrain.system.durable import read_json
from fasttrain.system.errors import UserError
from fasttrain.system.lock import lock
from fasttrain.system.options import Settings

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPTIONS = "--method moco --preset demo --size 16 --batch-size 24 --epochs 1 --queue-size 48"


@pytest.fixture
def results(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path / "proof.jsonl"


def case_of(tmp_path: pathlib.Path, data: pathlib.Path = pathlib.Path("nowhere"), **values: Any) -> ProofCase:
    given = {"table": "pieces", "case": "moco", "control": "moco", "options": OPTIONS, "seeds": (3,), **values}
    return ProofCase(data=str(data), runs=str(tmp_path / "runs"), **given)


def keep(results: pathlib.Path, *entries: dict[str, Any]) -> None:
    plain = {"table": "pieces", "control": "moco", "options": OPTIONS, "k": 200, "knn_top1": 50.0, "linear_top1": 60.0}
    with open(results, "a", encoding="ascii") as file:
        for entry in ({**plain, **each} for each in entries):
            words = ["--data", "x", *shlex.split(entry["options"]), "--seed", str(entry["seed"])]
            file.write(json.dumps({"settings": Settings.of(parse_config(words)).values, **entry}) + "\n")


def test_a_seed_is_trained_evaluated_and_kept_and_then_left_out(
    shards: pathlib.Path, tmp_path: pathlib.Path, results: pathlib.Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert proof.benchmark(case_of(tmp_path, shards)) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    (entry,) = proof.kept()
    assert (line["seeds"], entry["seed"], entry["options"]) == ([3], 3, OPTIONS)
    assert entry["steps"] == read_json(tmp_path / "runs/moco-3/ending.json")["step"] > 0
    assert entry["knn_top1"] == line["knn_top1"]
    assert 0 <= entry["linear_top1"] <= 100
    assert {"commit", "machine", "fingerprint", "images_per_sec"} <= set(entry)

    monkeypatch.setattr(proof, "command", lambda *words: pytest.fail(f"{words} for what is kept"))
    assert proof.benchmark(case_of(tmp_path, shards)) == 0
    assert json.loads(capsys.readouterr().out) == line
    assert results.read_bytes().count(b"\n") == 1


def test_a_seed_that_another_process_is_at_is_left_to_it(
    shards: pathlib.Path, tmp_path: pathlib.Path, results: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(results, {"case": "key-0.5", "seed": 4, "fingerprint": open_dataset(shards, "train").fingerprint})
    (tmp_path / "runs").mkdir()
    with lock(tmp_path / "runs/key-0.5-3.lock", "taken"):  # no other case's, though only the number differs
        assert proof.benchmark(case_of(tmp_path, shards, case="key-0.5", seeds=(3, 4))) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["seeds"] == [4]
    assert "key-0.5-3 is another process's" in said.err


def test_figures_of_other_options_are_not_taken_for_a_case(tmp_path: pathlib.Path, results: pathlib.Path) -> None:
    keep(results, {"case": "moco", "seed": 3, "options": OPTIONS.replace("--epochs 1", "--epochs 2")})
    with pytest.raises(UserError, match=r"moco: figures of other settings are kept .--epochs was 2, now 1.: take"):
        proof.benchmark(case_of(tmp_path))


def test_figures_are_not_taken_for_a_case_whose_defaults_have_changed(
    tmp_path: pathlib.Path, results: pathlib.Path
) -> None:
    settings = Settings.of(parse_config(["--data", "x", *shlex.split(OPTIONS), "--seed", "3"])).values
    keep(results, {"case": "moco", "seed": 4})
    with pytest.raises(UserError, match=r"moco: figures of other settings are kept .--k was 200, now 20.: take"):
        proof.benchmark(case_of(tmp_path, seeds=(4,), k=20))
    with pytest.raises(UserError, match=r"moco: figures of other settings are kept .--labelled was , now other.: take"):
        proof.benchmark(case_of(tmp_path, seeds=(4,), labelled="other"))
    keep(results, {"case": "moco", "seed": 3, "settings": {**settings, "ema": 0.5}})
    with pytest.raises(UserError, match=r"moco: figures of other settings are kept .--ema was 0.5, now 0.99.: take"):
        proof.benchmark(case_of(tmp_path))


def test_figures_of_other_images_are_not_taken_for_a_case(
    shards: pathlib.Path, tmp_path: pathlib.Path, results: pathlib.Path
) -> None:
    keep(results, {"case": "moco", "seed": 3, "fingerprint": "of others"})
    with pytest.raises(UserError, match=r"moco: figures of other images than .* are kept: set BENCHMARK_RESULTS to a"):
        proof.benchmark(case_of(tmp_path, shards))


def test_a_table_has_spreads_and_differences_over_the_seeds_that_both_have(results: pathlib.Path) -> None:
    keep(
        results,
        {"case": "moco", "seed": 0, "knn_top1": 50.0},
        {"case": "moco", "seed": 1, "knn_top1": 52.0},
        {"case": "moco", "seed": 2, "knn_top1": 90.0},
        {"case": "more", "seed": 1, "knn_top1": 1.0},  # measured again below: the newest counts
        {"case": "more", "seed": 0, "knn_top1": 51.0},
        {"case": "more", "seed": 1, "knn_top1": 55.0},
        {"case": "once", "seed": 0, "knn_top1": 49.0},
        {"case": "else", "seed": 0, "table": "other", "control": "more"},
        {"case": "alone", "seed": 9, "table": "other", "control": "more"},
    )
    found = proof_tables.cases()
    head = "| case | seeds | kNN | Δ kNN | linear | Δ linear |\n| --- | --- | --- | --- | --- | --- |\n"
    assert proof_tables.table("pieces", found) == head + (
        "| `moco` | 3 | 64.0 ± 22.5 |  | 60.0 ± 0.0 |  |\n"
        "| `more` | 2 | 53.0 ± 2.8 | +2.0 ± 1.0 | 60.0 ± 0.0 | +0.0 ± 0.0 |\n"
        "| `once` | 1 | 49.0 | −1.0 | 60.0 | +0.0 |\n"
    )
    assert proof_tables.table("other", found).splitlines()[2:] == [
        "| `more` | 2 | 53.0 ± 2.8 |  | 60.0 ± 0.0 |  |",
        "| `else` | 1 | 50.0 | −1.0 | 60.0 | +0.0 |",
        "| `alone` | 1 | 50.0 | – | 60.0 | – |",
    ]


def test_curves_beside_a_plain_loops_are_those_of_one_comparison(tmp_path: pathlib.Path, results: pathlib.Path) -> None:
    plain = {"options": [], "epochs": 4, "knn_every": 2, "fingerprint": "f", "device": "cpu"}
    entries = [
        {**plain, "seed": 0, "knn": {"ours": {"9": 1.0, "18": 1.0}, "theirs": {"9": 1.0, "18": 1.0}}},  # again below
        {**plain, "seed": 5, "epochs": 6, "knn": {"ours": {}, "theirs": {}}},
        {**plain, "seed": 1, "knn": {"ours": {"9": 44.0, "18": 50.0}, "theirs": {"9": 43.0, "18": 52.0}}},
        {**plain, "seed": 0, "knn": {"ours": {"9": 42.0, "18": 52.0}, "theirs": {"9": 43.0, "18": 50.0}}},
    ]
    (tmp_path / "equivalence.jsonl").write_text("".join(json.dumps(each) + "\n" for each in entries), "ascii")
    assert proof_tables.equivalence_table().splitlines()[2:] == [
        "| 2 | 2 | 43.0 ± 1.4 | 43.0 ± 0.0 | +0.0 ± 1.0 |",
        "| 4 | 2 | 51.0 ± 1.4 | 51.0 ± 1.4 | +0.0 ± 2.0 |",
    ]


def test_a_table_without_figures_says_so(results: pathlib.Path) -> None:
    for name in ("pieces", proof_tables.METHODS, proof_tables.EQUIVALENCE):
        page = f"<!-- proof {name} -->\nold\n<!-- end -->"
        assert proof_tables.filled(page, {}) == page.replace("old", "Not measured yet.")


def test_every_case_of_the_recipe_can_be_trained_and_gives_the_figures_that_are_kept(tmp_path: pathlib.Path) -> None:
    (tmp_path / "recipes").mkdir()
    image = tmp_path / "train/cat/1.jpg"
    image.parent.mkdir(parents=True)
    image.touch()
    script = shutil.copy(ROOT / "recipes/proof.sh", tmp_path / "recipes")
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >> calls\nprintf "\\036" >> calls\n', "utf-8"
    )
    python.chmod(0o755)
    subprocess.run(["bash", script, tmp_path, "0 1"], check=True, env={**os.environ, "PYTHON": str(python)})
    refused = subprocess.run(["bash", script, tmp_path / "data"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "SOURCE is CIFAR-10 as folders" in refused.stderr
    calls = [line.split("\0")[:-1] for line in (tmp_path / "calls").read_text("utf-8").split("\x1e")[:-1]]
    cases = [parse(ProofCase, words[1:]) for words in calls if words[0] == "benchmarks/proof.py"]
    by_name = {case.case: case for case in cases}
    assert len(by_name) == len(cases) > 80
    assert (tmp_path / "data/cifar10-long/train/cat/1.jpg").samefile(image)
    for case in cases:
        assert parse_config(["--data", "x", *shlex.split(case.options)])
        assert case.control in by_name
        assert case.seeds in ((0,), (0, 1))
    for each in proof.kept():
        assert proof.differences(by_name[each["case"]], each) == [], each["case"]


def test_a_picture_has_the_cases_of_its_page_alone(results: pathlib.Path) -> None:
    keep(
        results,
        {"case": "moco", "seed": 0},
        {"case": "more", "seed": 0},
        {"case": "else", "seed": 0, "table": "other"},
        {"case": "apart", "seed": 1, "table": "other"},  # its control lacks this seed
    )
    page = "<!-- proof other -->\n<!-- end -->"
    assert [case.name for case in proof_tables.compared(page, proof_tables.cases())] == ["else"]


def test_the_pages_tell_what_was_measured() -> None:
    found = proof_tables.cases()
    for page in proof_tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert proof_tables.filled(text, found) == text, f"{page.name}: run benchmarks/proof_tables.py"
