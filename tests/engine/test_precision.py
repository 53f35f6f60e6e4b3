"""--precision auto is what the machine multiplies in, and binds the run from then on."""

import pathlib

import pytest
import torch
from support.launch import train

from fasttrain.config import load_config
from fasttrain.engine import precision
from fasttrain.engine.precision import fastest_precision, slow

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ZEN_2 = "model name\t: AMD EPYC\nflags\t\t: fpu avx avx2 fma\n"
ZEN_4 = "model name\t: AMD EPYC\nflags\t\t: fpu avx avx2 fma avx512f avx512_bf16\n"
SKYLAKE = "model name\t: Intel Xeon\nflags\t\t: fpu avx2 avx512f avx512bw avx512vl\nbugs\t\t: bf16\n"
GRAVITON_3 = "Features\t: fp asimd sve bf16 i8mm\nCPU implementer\t: 0x41\n"


@pytest.fixture
def cpu_info(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """What a test says of the CPU."""
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(precision, "CPU_INFO", file)
    return file


@pytest.mark.parametrize(
    ("told", "found"), [(ZEN_2, "fp32"), (ZEN_4, "bf16"), (SKYLAKE, "fp32"), (GRAVITON_3, "bf16"), ("", "fp32")]
)
def test_a_cpu_computes_in_bf16_where_it_multiplies_in_it(cpu_info: pathlib.Path, told: str, found: str) -> None:
    cpu_info.write_text(told, "utf-8")
    assert fastest_precision(CPU) == found
    lines = {asked: slow(asked, CPU) for asked in ("bf16", "fp16", "fp32")}
    assert lines["fp32"] == ""
    assert lines["fp16"] == "this CPU does not multiply in fp16: --precision fp32 is many times faster"
    assert ("does not multiply in bf16" in lines["bf16"]) == (found == "fp32")


def test_nothing_is_known_of_a_cpu_whose_system_does_not_tell(cpu_info: pathlib.Path) -> None:
    assert fastest_precision(CPU) == "fp32"


@pytest.mark.parametrize(("native", "found"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_computes_in_fp16_where_it_has_no_bf16(monkeypatch: pytest.MonkeyPatch, native: bool, found: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert fastest_precision(GPU) == found
    assert slow("fp16", GPU) == slow("bf16", GPU) == ""


def test_a_run_goes_on_in_the_precision_it_began_in(
    shards: pathlib.Path, tmp_path: pathlib.Path, cpu_info: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    cpu_info.write_text(ZEN_2, "utf-8")
    words = [shards, run, "--precision", "auto"]
    assert train(*words, "--max-steps", 2) == 0
    assert "--precision fp32: this machine does not multiply in bf16" in capsys.readouterr().err
    assert load_config(run).optimisation.precision == "fp32"
    cpu_info.write_text(ZEN_4, "utf-8")
    assert train(*words, "--max-steps", 4) == 2
    assert "--precision was 'fp32', now 'bf16'" in capsys.readouterr().err
    assert train(shards, run, "--precision", "fp32", "--max-steps", 4) == 0
    assert "multiply" not in capsys.readouterr().err


def test_a_precision_that_is_slow_is_obeyed_and_said(
    shards: pathlib.Path, tmp_path: pathlib.Path, cpu_info: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu_info.write_text(ZEN_2, "utf-8")
    assert train(shards, tmp_path / "run", "--precision", "bf16", "--max-steps", 1) == 0
    assert "note: this CPU does not multiply in bf16: --precision fp32 is many times faster" in capsys.readouterr().err
    assert load_config(tmp_path / "run").optimisation.precision == "bf16"
