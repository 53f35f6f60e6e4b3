"""All that a GPU is asked comes in parts, of which none can keep the others from being measured."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from support.launch import wait_for_end

from benchmarks import gpu_day
from benchmarks.gpu_day import DONE, FAILED, NO_TIME, TOO_LONG, GpuDay, Part
from benchmarks.gpu_profile import of_trace
from fasttrain.system.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


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
        monkeypatch, Part("wrong", 60, says("no", 1)), Part("stuck", 15, [["-c", hangs]]),
        Part("good", 60, [["-c", keeps]]), Part("two", 60, [*says("{}", 1), *says('{"never": 1}')]),
    )  # fmt: skip
    assert gpu_day.day(GpuDay(out=str(tmp_path / "out"))) == 1
    lines = [json.loads(line) for line in (tmp_path / "out/gpu-day.jsonl").read_text("ascii").splitlines()]
    assert [(line["name"], line["status"]) for line in lines] == [
        ("wrong", FAILED), ("stuck", TOO_LONG), ("good", DONE), ("two", FAILED),
    ]  # fmt: skip
    assert [line["figures"] for line in lines] == [{}, {}, {"ms": 3}, {}]
    assert {"commit", "machine", "versions"} <= set(lines[0])
    wait_for_end(int(child.read_text("ascii")))
    assert json.loads((tmp_path / "out/of_part.jsonl").read_text("ascii"))["a"] == 1
    log = (tmp_path / "out/gpu-day.log").read_text("utf-8")
    assert [line[3:] for line in log.splitlines() if line.startswith("== ")] == ["wrong", "stuck", "good", "two"]
    assert 'working\n{"ms": 3}\n' in log
    said = capsys.readouterr().out.splitlines()
    assert "== stuck: took too long" in "\n".join(said)
    assert {name: each["status"] for name, each in json.loads(said[-1]).items()}["good"] == DONE


def test_when_no_time_is_left_the_rest_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of(monkeypatch, Part("long", 60, [["-c", "import time; time.sleep(600)"]]), Part("late", 60, says("{}")))
    assert gpu_day.day(GpuDay(out=str(tmp_path / "out"), seconds=gpu_day.LEAST + 1)) == 1
    lines = [json.loads(line) for line in (tmp_path / "out/gpu-day.jsonl").read_text("ascii").splitlines()]
    assert [(line["name"], line["status"]) for line in lines] == [("long", TOO_LONG), ("late", NO_TIME)]


def test_tests_may_be_cut_short_but_not_fail(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ends, status, counts in (
        ("assert True", 0, {"passed": 2, "failed": 0, "error": 0}),
        ("assert False", 1, {"passed": 1, "failed": 1, "error": 0}),
    ):
        folder = tmp_path / ends.split()[1]
        folder.mkdir()
        text = f"import time\ndef test_a(): pass\ndef test_b(): {ends}\ndef test_c(): time.sleep(600)\n"
        (folder / "test_of_part.py").write_text(text, "ascii")
        words = gpu_day.tests(GpuDay(), "not gpu", "-c", str(ROOT / "pyproject.toml"), str(folder))
        plan_of(monkeypatch, Part("tests", 25, [words]))
        assert gpu_day.day(GpuDay(out=str(folder / "out"))) == status
        line = json.loads((folder / "out/gpu-day.jsonl").read_text("ascii"))
        assert line["figures"] == counts


def test_files_of_tests_that_cannot_be_read_are_wrong(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("test_of_part", "def test_a(): pass"), ("test_other_part", "import not_installed_anywhere")):
        (tmp_path / f"{name}.py").write_text(text, "ascii")
    words = gpu_day.tests(GpuDay(), "not gpu", "-c", str(ROOT / "pyproject.toml"), str(tmp_path))
    plan_of(monkeypatch, Part("tests", 60, [words]))
    assert gpu_day.day(GpuDay(out=str(tmp_path / "out"))) == 1
    line = json.loads((tmp_path / "out/gpu-day.jsonl").read_text("ascii"))
    assert line["figures"] == {"passed": 1, "failed": 0, "error": 1}


def test_without_a_gpu_nothing_is_begun(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no GPU here"):
        gpu_day.day(GpuDay(out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_most_telling_parts_fit_together() -> None:
    parts = gpu_day.plan(GpuDay())
    assert [part.name for part in parts[:5]] == ["images", "right", "kernels", "compiled", "step"]
    assert sum(part.seconds for part in parts[:6]) < GpuDay().seconds < 560
    for part in parts:
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
            event("cuLaunchKernelEx", "cuda_driver", 700, 50), event("cudaDeviceSynchronize", "cuda_runtime", 800, 999),
            {"ph": "i", "name": "mark", "cat": "kernel", "ts": 1},
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
@pytest.mark.timeout(900)
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
