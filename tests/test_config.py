"""The command line: presets, and one line for what can't be."""

import re

import pytest

from fasttrain.config import PRESETS, TrainConfig, as_dict, differences, parse_config
from fasttrain.engine.ranks import Ranks
from fasttrain.system.errors import UserError


def test_defaults_and_presets():
    assert parse_config(["--data", "x"]) == TrainConfig(data="x")
    config = parse_config(["--preset", "cifar10", "--data", "x", "--batch-size", "256"])
    assert (config.arch, config.cifar_stem, config.batch_size, config.queue_size) == ("resnet18", True, 256, 4096)
    assert parse_config(["--data=x", "--preset=demo"]).arch == PRESETS["demo"]["arch"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x", "--batchsize", "3"], "Unrecognized options: --batchsize.*did you mean --batch-size"),
        (["--data", "x", "--gpu", "1", "--fast"], "Unrecognized options: --gpu, --fast "),
        (["--data", "x", "--gpu", "1", "--batchsize", "3"], "options: --gpu, --batchsize; did you mean --batch-size"),
        (["--data", "x", "stray"], "Unrecognized options: stray"),
        ([], "--data"),
        (["--data", "x", "--lr", "fast"], "--lr"),
        (["--data", "x", "--preset", "huge"], "--preset"),
        (["--data", "x", "--precision", "fp8"], "fp8.*bf16"),
    ],
)
def test_bad_command_lines_are_one_line_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(words)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--batch-size", "-4"], "--batch-size must be above 0"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--lr", "nan"], "--lr must be above 0"),
        (["--ema", "1"], "--ema must be"),
        (["--cross-weight", "-1"], "--cross-weight must not be negative"),
        (["--warmup-epochs", "200"], "leaves nothing"),
        (["--accumulate", "0"], "--accumulate must be above 0"),
        (["--clip-norm", "-1"], "--clip-norm must not be negative"),
        (["--workers", "0"], "--workers 0: must be auto, or at least 1"),
        (["--resolution", "256:224"], "--resolution '256:224' is not two sides of views such as 128:224"),
        (["--resolution", "128:224", "--size", "160"], "ends with views of 224 px, --size 160 is another"),
    ],
)
def test_values_no_run_could_use(words, message):
    with pytest.raises(UserError, match=message):
        parse_config(["--data", "x", *words])


def test_an_optimizer_brings_its_defaults():
    """MoCo v3's for LARS and AdamW; what is typed counts more, in any order."""
    config = parse_config(["--data", "x", "--optimizer", "lars"])
    assert (config.lr, config.weight_decay) == (0.6, 1e-6)
    config = parse_config(["--lr", "0.001", "--data=x", "--preset=cifar10", "--optimizer=adamw"])
    assert (config.lr, config.weight_decay, config.batch_size) == (0.001, 0.1, 512)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text


def test_differences_are_of_what_changes_the_result():
    saved = as_dict(TrainConfig(data="x", workers=3))
    assert differences(saved, TrainConfig(data="y", workers=1, max_steps=9)) == []
    assert differences(saved, TrainConfig(data="x", lr=0.5)) == ["--lr was 0.03, now 0.5"]


def test_workers_are_a_number_or_all_the_cores():
    assert parse_config(["--data", "x"]).workers == parse_config(["--data", "x", "--workers", "auto"]).workers == "auto"
    assert parse_config(["--data", "x", "--workers", "3"]).workers == 3
    ranks = Ranks("cpu")
    assert (ranks.threads("auto"), ranks.threads(3)) == (ranks.cores, 3)


def test_a_resolution_sets_the_first_and_the_final_side():
    config = parse_config(["--data", "x", "--resolution", "96:160"])
    assert (config.start_size, config.size) == (96, 160)
    assert parse_config(["--data", "x", "--resolution", "96:160", "--size", "160"]).size == 160
    assert parse_config(["--data", "x"]).start_size == 224
