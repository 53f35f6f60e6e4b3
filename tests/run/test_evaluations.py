"""evaluation.json keeps every accuracy that was measured, and none that is damaged ends anything."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fasttrain.run import evaluations
from fasttrain.run.evaluations import FILE, Evaluation, keep_evaluations, read_evaluations
from fasttrain.system.errors import UserError
from fasttrain.system.lock import lock

KNN = Evaluation("knn", 8, False, {"k": 5}, "/data/a", "f1", 100, 50.0, 49.0, 10.0, 90.0, 40.0, 60.0, {"a": 50.0})


def test_figures_of_other_steps_data_and_protocols_stay(tmp_path: Path) -> None:
    others = [
        replace(KNN, protocol="linear", settings={}), replace(KNN, untrained=True), replace(KNN, step=9),
        replace(KNN, fingerprint="f2"), replace(KNN, settings={"k": 6}), replace(KNN, variant="on_b"),
    ]  # fmt: skip
    for each in (KNN, *others):
        keep_evaluations(tmp_path, [each])
    assert read_evaluations(tmp_path) == [KNN, *others]
    again = replace(KNN, data="/moved/a", top1=51.0)
    keep_evaluations(tmp_path, [again])
    assert read_evaluations(tmp_path) == [*others, again]


def test_a_file_does_not_grow_too_large_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "MAX_BYTES", 20_000)
    many = dict.fromkeys((f"class {number}" for number in range(200)), 50.0)
    for step in range(8):
        keep_evaluations(tmp_path, [replace(KNN, step=step, per_class=many)])
    found = read_evaluations(tmp_path)
    assert [each.step for each in found] == list(range(8))
    assert found[-1].per_class == many
    assert found[0].per_class is None


def test_a_file_of_the_last_evaluation_alone_is_read(tmp_path: Path) -> None:
    settings = {"data": "d", "k": 20, "temperature": 0.1, "features": "encoder"}
    flat = {"step": 4, "knn_top1": 5.5, "linear_top1_untrained": 6, "settings": settings}
    (tmp_path / FILE).write_text(json.dumps(flat))
    keep_evaluations(tmp_path, [KNN])
    knn, linear, new = read_evaluations(tmp_path)
    assert (knn.protocol, knn.step, knn.top1, knn.data, knn.settings["k"]) == ("knn", 4, 5.5, "d", 20)
    assert (linear.protocol, linear.untrained, linear.top1, linear.balanced) == ("linear", True, 6, None)
    assert new == KNN


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"evaluations": 5}', b'{"evaluations": [{"step"', b"\xff", b"[" * 9999]
)
def test_a_damaged_file_is_named_and_kept_beside_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert read_evaluations(tmp_path) == []
    assert f"warning: {tmp_path / FILE} is damaged, all in it left out" in capsys.readouterr().err
    keep_evaluations(tmp_path, [KNN])
    assert read_evaluations(tmp_path) == [KNN]
    assert (tmp_path / f"{FILE}.damaged").read_bytes() == content


@pytest.mark.parametrize("name", list(asdict(KNN)))
@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 1e9, True, "missing"])
def test_an_entry_with_a_value_of_another_kind_is_left_out_alone(tmp_path: Path, name: str, value: Any) -> None:
    entry = asdict(KNN)
    if value == "missing":
        del entry[name]
    else:
        entry[name] = value
    (tmp_path / FILE).write_text(json.dumps({"evaluations": [entry, asdict(replace(KNN, step=2))]}))
    found = read_evaluations(tmp_path)
    assert found[-1].step == 2
    for each in found[:-1]:  # a value that is as good as another
        assert type(getattr(each, name)) is type(getattr(KNN, name)) or value is None or value == "missing"
        keep_evaluations(tmp_path, [each])


def test_evaluations_that_end_at_once_leave_out_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reads what the first has written, and never waits for ever."""
    monkeypatch.setattr(evaluations, "PATIENCE_SECONDS", 0.0)
    with lock(tmp_path / evaluations.LOCK, ""), pytest.raises(UserError, match="another process is writing"):
        keep_evaluations(tmp_path, [KNN])
    keep_evaluations(tmp_path, [KNN])
    assert read_evaluations(tmp_path) == [KNN]
