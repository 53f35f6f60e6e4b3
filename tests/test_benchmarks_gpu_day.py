"""All that a GPU is asked comes in parts, of which none can keep the others from being measured."""

import json
import pathlib
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks import gpu_day
from benchmarks.gpu_day import DONE, FAILED, NO_TIME, TOO_LONG, GpuDay, Part
from benchmarks.gpu_profile import of_trace

ROOT = pathlib.Path(__file__).resolve().parents[1]


def plan_of(monkeypatch: pytest.MonkeyPatch, *parts: Part) -> None:
    monkeypatch.setattr(gpu_day, "plan", lambda options: list(parts))


def says(text: str, status: int = 0) -> list[list[str]]:
    return [["-c", f"print('working'); print('''{text}'''); raise SystemExit({status})"]]


def test_a_part_that_fails_or_hangs_does_not_keep_the_others_from_being_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child"
    hangs = (
        "import subprocess; process = subprocess.Popen(['sleep', '600']); "
        f"open({str(child)!r}, 'w').write(str(process.pid)); process.wait()"
    )
    keeps = "from benchmarks import record; record.append('of_part', {'a': 1}); print('working'); print('{\"ms\": 3}')"
    plan_of(
        monkeypatch, Part("wrong", 60, says("no", 1)), Part("stuck", 5, [["-c", hangs]]),
        Part("good", 60, [["-c", keeps]]), Part("two", 60, [*says("{}", 1), *says('{"never": 1}')]),
    )  # fmt: skip
    assert gpu_day.day(GpuDay(out=str(tmp_path / "out"))) == 1
    lines = [json.loads(line) for line in (tmp_path / "out/gpu-day.jsonl").read_text("ascii").splitlines()]
    assert [(line["name"], line["status"]) for line in lines] == [
        ("wrong", FAILED), ("stuck", TOO_LONG), ("good", DONE), ("two", FAILED),
    ]  # fmt: skip
    assert [line["figures"] for line in lines] == [{}, {}, {"ms": 3}, {}]
    assert {"commit", "machine", "versions"} <= set(lines[0])
    assert not psutil.pid_exists(int(child.read_text("ascii")))
    assert json.loads((tmp_path / "out/of_part.jsonl").read_text("ascii"))["a"] == 1
    log = (tmp_path / "out/gpu-day.log").read_text("utf-8")
    assert [line[3:] for line in log.splitlines() if line.startswith("== ")] == ["wrong", "stuck", "good", "two"]
    assert 'working\n{"ms": 3}\n' in log
    said = capsys.readouterr().out.splitlines()
    assert "== stuck: took too long" in "\n".join(said)
    assert {name: each["status"] for name, each in json.loads(said[-1]).items()}["good"] == DONE


def test_when_no_time_is_left_the_rest_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of(monkeypatch, Part("long", 60, [["-c", "import time; time.sleep(600)"]]), Part("late", 60, says("{}")))
    began = time.monotonic()
    assert gpu_day.day(GpuDay(out=str(tmp_path / "out"), seconds=gpu_day.LEAST + 1)) == 1
    lines = [json.loads(line) for line in (tmp_path / "out/gpu-day.jsonl").read_text("ascii").splitlines()]
    assert [(line["name"], line["status"]) for line in lines] == [("long", TOO_LONG), ("late", NO_TIME)]
    assert time.monotonic() - began < 60


def test_tests_may_be_cut_short_but_not_fail(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for last, status in (("PASSED", 0), ("FAILED", 1)):
        said = f"import time; print('a.py::b PASSED [ 1%]'); print('a.py::c {last} [ 2%]'); time.sleep(600)"
        plan_of(monkeypatch, Part("tests", 3, [["-c", said]]))
        assert gpu_day.day(GpuDay(out=str(tmp_path / last))) == status
        line = json.loads((tmp_path / last / "gpu-day.jsonl").read_text("ascii"))
        assert line["figures"] == {"passed": 2 - status, "failed": status, "error": 0}


def test_parts_together_have_their_time_and_tests_what_is_left() -> None:
    options = GpuDay()
    *parts, tests = gpu_day.plan(options)
    assert tests.name == "tests"
    assert tests.seconds == options.seconds < 560
    assert [part.name for part in parts[:4]] == ["images", "right", "compiled", "step"]
    for part in (*parts, tests):
        assert all((ROOT / words[0]).exists() or words[0] == "-m" for words in part.commands)


def test_images_of_a_kit_are_taken_where_it_has_them(tmp_path: pathlib.Path) -> None:
    for folder in ("kit/photos", "kit-cifar"):
        (tmp_path / folder).mkdir(parents=True)
    commands = {
        part.name: part.commands[0] for part in gpu_day.plan(GpuDay(kit=str(tmp_path / "kit"))) if part.commands
    }
    assert "images" not in commands
    for name in ("right", "views", "loaded", "loader"):
        assert str(tmp_path / "kit/photos") in commands[name]
    assert str(tmp_path / "kit-cifar") in commands["cifar"]


def test_a_profile_of_a_trace_has_kernels_gaps_and_waits() -> None:
    def event(name: str, cat: str, ts: float, dur: float) -> dict[str, object]:
        return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur}

    found = of_trace(
        [
            event("gemm", "kernel", 1000, 400), event("gemm", "kernel", 1300, 200),  # two streams: 100 together
            event("Memcpy DtoD", "gpu_memcpy", 1600, 100),  # after a gap of 100
            event("add", "kernel", 1700.5, 299.5),  # half a microsecond is none
            event("aten::mm", "cpu_op", 0, 9000), event("cudaStreamSynchronize", "cuda_runtime", 0, 600),
            event("cudaLaunchKernel", "cuda_runtime", 0, 50), {"ph": "i", "name": "mark", "cat": "kernel", "ts": 1},
        ],
        steps=2,
    )  # fmt: skip
    assert found.ms == 0.5
    assert found.busy == pytest.approx(0.8995)
    assert (found.gaps, found.waits_ms) == (0.5, 0.3)
    assert [tuple(line) for line in found.lines] == [
        ("gemm", 0.3, 1), ("add", pytest.approx(0.14975), 0.5), ("Memcpy DtoD", 0.05, 0.5),
    ]  # fmt: skip
    assert of_trace([], 3).lines == []


@pytest.mark.slow
def test_the_whole_day_runs_small_on_a_cpu(tmp_path: pathlib.Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("out", "work", "kit")}
    words = [word for name, folder in folders.items() for word in (f"--{name}", folder)]
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_day.py", "--dry", *words],
        cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    ended = {name: each["status"] for name, each in json.loads(done.stdout.splitlines()[-1]).items()}
    assert ended == dict.fromkeys(ended, DONE), (tmp_path / "out/gpu-day.log").read_text("utf-8")
    assert len(list((tmp_path / "out").iterdir())) <= 8
    lines = [json.loads(line) for line in (tmp_path / "out/gpu-day.jsonl").read_text("ascii").splitlines()]
    figures = {line["name"]: line["figures"] for line in lines}
    assert figures["step"]["vs_moco_fp32"] > 0
    assert "vs_moco_fp32" not in figures["loaded"]
    assert figures["loaded"]["loaded_vs_synthetic"] > 0
    assert figures["cifar"]["images_per_sec"] > 0
    assert "ms_16" in figures["losses"]
    assert figures["profile"]["method"] == "xmoco"
