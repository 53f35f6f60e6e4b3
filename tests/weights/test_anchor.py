"""Training beside an earlier run's encoder (--anchor), as it is typed."""

import json
import pathlib
import shutil
from typing import Any

import pytest
import torch
from support.commands import one_line_of
from support.encoders import source as source_of
from support.forks import on_ranks
from support.launch import equal, final_state
from torch import Tensor

from fasttrain.config import make_config
from fasttrain.engine.networks import initialise, make_method
from fasttrain.engine.ranks import Ranks
from fasttrain.jobs.init import all_initial_weights, initial_weights
from fasttrain.networks.encoders import make_encoder
from fasttrain.networks.options import EncoderOptions
from fasttrain.run.metrics import read_metrics
from fasttrain.train import main
from fasttrain.trained import load_trained
from fasttrain.weights.formats import FORMATS

TINY = [
    "--method", "simclr", "--arch", "small", "--size", "16", "--batch-size", "16", "--dim", "16", "--hidden", "32",
    "--epochs", "4", "--optimizer", "sgd", "--lr", "0.8", "--warmup-epochs", "0", "--log-every", "1",
]  # fmt: skip


def words(data: pathlib.Path, run: pathlib.Path, *more: object) -> list[str]:
    return ["--data", str(data), "--run", str(run), *TINY, *map(str, more)]


@pytest.fixture(scope="module")
def source(shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that has trained for three steps."""
    run = tmp_path_factory.mktemp("source") / "run"
    assert main(words(shards, run, "--max-steps", 3)) == 0
    return run


def anchor_of(state: dict[str, Any]) -> dict[str, Tensor]:
    prefix = "anchor_encoder.encoder."
    named = {name.removeprefix(prefix): tensor for name, tensor in state["method"].items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in named.items() if not name.endswith("num_batches_tracked")}


def encoder_of(run: pathlib.Path) -> dict[str, Tensor]:
    state = load_trained(run).encoder.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def test_a_run_goes_on_without_the_one_that_it_is_anchored_to(
    source: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, expected = shutil.copytree(source, tmp_path / "first"), encoder_of(source)
    for name, steps in (("whole", 8), ("run", 5)):
        assert main(words(shards, tmp_path / name, "--anchor", first, "--max-steps", steps)) == 0
    count = len(expected)
    assert f"--anchor {first}: {count} of {count} tensors of the encoder taken\n" in capsys.readouterr().err
    run, digest = tmp_path / "run", load_trained(first).digest
    record = json.loads((run / "config.json").read_text())["anchor"]
    assert record == {
        "source": f"{first}/checkpoints/step-000000003.pt", "digest": digest, "taken": count, "of": count,
        "not_taken": [],
    }  # fmt: skip
    assert digest in (run / "report.html").read_text()

    shutil.rmtree(first)
    assert main(words(shards, run, "--anchor", first, "--max-steps", 8)) == 0
    assert "--anchor" not in capsys.readouterr().err
    assert equal(final_state(tmp_path / "whole"), final_state(run)) == []
    assert json.loads((run / "config.json").read_text())["anchor"] == record
    assert equal(anchor_of(final_state(run)), expected) == []
    assert equal(encoder_of(run), expected) != []
    curves = {name for entry in read_metrics(run / "metrics.jsonl") for name in entry}
    assert {"anchor_absolute", "anchor_relative", "anchor_met"} <= curves

    assert main(words(shards, run, "--anchor", first, "--fresh")) == 2
    assert "--anchor" in one_line_of(capsys.readouterr().err)
    assert final_state(run)["step"] == 8  # it was not moved aside
    assert main(words(shards, run, "--anchor", source)) == 2
    assert "--anchor was" in one_line_of(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere", "there is no such file or folder"),
        ("another arch", "it has none of the encoder's"),
        ("a part", "an anchor is the whole of an encoder like this run's"),
    ],
)
def test_what_is_no_anchor_is_one_line_before_the_run_folder_is_made(
    given: str, said: str, shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "first"
    if given == "another arch":
        assert main(words(shards, path, "--max-steps", 1, "--arch", "vit_tiny", "--patch-size", 8)) == 0
    if given == "a part":
        state = make_encoder(EncoderOptions(arch="small"), 16)[0].state_dict()
        del state["0.0.weight"]
        torch.save(state, path)
    capsys.readouterr()
    partial = ["--init", path, "--init-partial"] if given == "a part" else []  # which an anchor can't be
    assert main(words(shards, tmp_path / "run", "--anchor", path, *partial)) == 2
    line = one_line_of(capsys.readouterr().err)
    assert f"--anchor {path}: " in line
    assert said in line
    assert "--init" not in line
    assert not (tmp_path / "run").exists()


def test_first_weights_and_an_anchors_do_not_meet(tmp_path: pathlib.Path) -> None:
    """In either order."""
    config = make_config(
        "simclr", data="d", arch="small", size=16, init=str(tmp_path / "init"), anchor=str(tmp_path / "anchor")
    )
    built = make_method(config.method, config.encoder, 16, 0)
    for option, value in (("init", 2.0), ("anchor", 3.0)):
        state = make_encoder(config.encoder, 16)[0].state_dict()
        torch.save({name: torch.full_like(tensor, value) for name, tensor in state.items()}, tmp_path / option)
    for order in (("init", "anchor"), ("anchor", "init")):
        for option in order:
            initialise(built, initial_weights(config, built.encoder, option=option).weights, option == "anchor")
        assert {float(p.detach().flatten()[0]) for p in built.encoder.parameters()} == {2.0}
        assert {float(p.flatten()[0]) for p in built.anchor_encoder.parameters()} == {3.0}


def test_an_exported_encoder_is_an_anchor(tmp_path: pathlib.Path) -> None:
    FORMATS["torchvision"].write(source_of("resnet18"), tmp_path / "w.pth")
    config = make_config("simclr", data="d", arch="resnet18", size=32, anchor=str(tmp_path / "w.pth"))
    encoder, _ = make_encoder(config.encoder, 32)
    given = all_initial_weights(config, encoder, Ranks("cpu"))
    assert list(given) == ["anchor"]
    assert given["anchor"].record["taken"] == given["anchor"].record["of"]


def test_ranks_have_the_same_anchor(source: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    done = on_ranks(tmp_path, 2, main, words(shards, run, "--anchor", source, "--max-steps", 2))
    assert [each.returncode for each in done] == [0, 0], done
    assert sum(line.startswith("--anchor ") for each in done for line in each.stderr.splitlines()) == 1
    assert equal(anchor_of(final_state(run)), encoder_of(source)) == []
