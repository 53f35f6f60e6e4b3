"""Training that starts from weights (--init), as it is typed."""

import json
import pathlib
import shutil
from typing import Any

import pytest
import torch
from support.commands import one_line_of
from support.encoders import source as source_of
from support.launch import equal, final_state, train, train_on_ranks
from torch import Tensor

from fasttrain import evaluate
from fasttrain.config import make_config
from fasttrain.engine.networks import initialise, make_method
from fasttrain.engine.ranks import Ranks
from fasttrain.jobs.init import all_initial_weights, initial_weights
from fasttrain.networks.encoders import make_encoder
from fasttrain.networks.options import EncoderOptions, VisionTransformerOptions
from fasttrain.run.checkpoint import saved_checkpoints
from fasttrain.system.errors import UserError
from fasttrain.train import main
from fasttrain.trained import load_trained
from fasttrain.weights.formats import FORMATS

SMALL = EncoderOptions(arch="small")


@pytest.fixture(scope="module")
def source(shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that has trained for three steps."""
    run = tmp_path_factory.mktemp("source") / "run"
    assert train(shards, run, "--max-steps", 3, "--method", "moco") == 0
    return run


def random_file(folder: pathlib.Path, name: str = "weights.pth") -> pathlib.Path:
    """A file of a small encoder's random weights."""
    torch.save({"state_dict": moved(make_encoder(SMALL, 16)[0].state_dict())}, folder / name)
    return folder / name


def moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 0.01 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def first_weights(run: pathlib.Path, network: str = "encoder") -> dict[str, Tensor]:
    """A network's weights after a step whose rate was nearly 0."""
    state = final_state(run)["method"]
    return {n.removeprefix(f"{network}."): t for n, t in state.items() if n.startswith(f"{network}.")}


def record_of(run: pathlib.Path) -> dict:
    return json.loads((run / "config.json").read_text())["init"]


STILL = ["--max-steps", 1, "--lr", 1e-12, "--weight-decay", 0]


@pytest.mark.parametrize("which", ["the run", "its newest checkpoint"])
def test_a_run_starts_from_anothers_encoder(
    which: str, source: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved_checkpoints(source / "checkpoints")[0]
    run, given = tmp_path / "run", source if which == "the run" else checkpoint
    assert train(shards, run, "--init", given, *STILL) == 0
    expected = load_trained(source).encoder.state_dict()
    for network in ("encoder", "key_encoder"):
        for name, tensor in first_weights(run, network).items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    count = sum(not name.endswith("num_batches_tracked") for name in expected)
    assert f"--init {given}: {count} of {count} tensors of the encoder taken\n" in capsys.readouterr().err
    digest = load_trained(source).digest
    wanted = {"source": str(checkpoint), "digest": digest, "taken": count, "of": count, "not_taken": []}
    assert record_of(run) == wanted
    assert digest in (run / "report.html").read_text()


def test_a_run_goes_on_without_the_file_it_started_from(
    shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_file(tmp_path)
    assert train(shards, tmp_path / "whole", "--init", weights) == 0
    assert train(shards, tmp_path / "run", "--init", weights, "--max-steps", 5) == 0
    record = record_of(tmp_path / "run")
    weights.unlink()
    capsys.readouterr()
    assert train(shards, tmp_path / "run", "--init", weights) == 0
    assert "--init" not in capsys.readouterr().err
    assert equal(final_state(tmp_path / "whole"), final_state(tmp_path / "run")) == []
    assert record_of(tmp_path / "run") == record
    assert train(shards, tmp_path / "run", "--init", weights, "--fresh") == 2
    assert final_state(tmp_path / "run")["step"] == 16  # it was not moved aside
    assert not (tmp_path / "run.previous-1").exists()


def test_fresh_reads_the_file_again(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    weights = random_file(tmp_path)
    assert train(shards, tmp_path / "run", "--init", weights, *STILL) == 0
    before = record_of(tmp_path / "run")["digest"]
    torch.save(moved(torch.load(weights)["state_dict"]), weights)
    assert train(shards, tmp_path / "run", "--init", weights, *STILL, "--fresh") == 0
    assert record_of(tmp_path / "run")["digest"] != before


def test_another_file_is_another_setting(
    shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, tmp_path / "run", "--init", random_file(tmp_path), "--max-steps", 1) == 0
    assert train(shards, tmp_path / "run", "--init", random_file(tmp_path, "other.pth")) == 2
    assert "--init was" in one_line_of(capsys.readouterr().err)


def test_fewer_than_all_tensors_need_init_partial(
    shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = moved(make_encoder(SMALL, 16)[0].state_dict())
    state["0.0.weight"] = torch.ones(32, 3, 7, 7)
    torch.save(state, tmp_path / "w.pth")
    run = tmp_path / "run"
    assert train(shards, run, "--init", tmp_path / "w.pth") == 2
    line = one_line_of(capsys.readouterr().err)
    assert "not taken: 0.0.weight (32×3×7×7 there, 32×3×3×3 here); --init-partial" in line
    assert not run.exists()
    assert train(shards, run, "--init", tmp_path / "w.pth", "--init-partial", *STILL) == 0
    assert record_of(run)["not_taken"] == ["0.0.weight"]
    assert record_of(run)["taken"] == record_of(run)["of"] - 1
    weights = first_weights(run)
    torch.testing.assert_close(weights["1.conv1.weight"], state["1.conv1.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"no weights", "no file of torch.save"),
        (b"PK\x03\x04", "can't be read"),
        (None, "DEFAULT"),
    ],
)
def test_bad_weights_are_one_line_before_the_run_folder_is_made(
    content: bytes | None, said: str, shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    words = ["--arch", "resnet18"] if content is None else []
    assert train(shards, tmp_path / "run", "--init", path, *words) == 2
    line = one_line_of(capsys.readouterr().err)
    assert f"--init {path}: " in line
    assert said in line
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_of_a_run_is_one_line(
    source: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    checkpoint = saved_checkpoints(copy / "checkpoints")[0]
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:-500])
    assert train(shards, tmp_path / "run", "--init", checkpoint) == 2
    assert "its end is missing" in one_line_of(capsys.readouterr().err)
    (tmp_path / "alone.pt").write_bytes(content)
    assert train(shards, tmp_path / "run", "--init", tmp_path / "alone.pt") == 2
    assert "only inside of its run folder" in one_line_of(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("method", "average"),
    [
        ("moco", "key_encoder"),
        ("mocov3", "momentum_encoder"),
        ("byol", "momentum_encoder"),
        ("dino", "momentum_encoder"),
    ],
)
@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny"])
def test_both_encoders_start_equal(method: str, average: str, arch: str, tmp_path: pathlib.Path) -> None:
    """Also where the method sets some of its encoder's weights itself, such as the last scales of a ResNet's blocks."""
    config = make_config(method, data="d", arch=arch, size=32, dim=16, init=str(tmp_path / "w.pth"), batch_norm="split")
    encoder, _ = make_encoder(config.encoder, 32)
    fixed = {name: tensor for name, tensor in encoder.named_buffers() if name.endswith("pos_embedding")}
    state = {**moved(encoder.state_dict()), **fixed}
    torch.save(state, tmp_path / "w.pth")
    built = make_method(config.method, config.encoder, 32, 0)
    initialise(built, initial_weights(config, built.encoder).weights)
    for network in (built.encoder, getattr(built, average)):
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_a_network_that_minds_the_version_of_its_state_starts_from_weights(tmp_path: pathlib.Path) -> None:
    config = make_config("moco", data="d", arch="mnasnet0_5", size=32, init=str(tmp_path / "w.pth"))
    state = moved(make_encoder(config.encoder, 32)[0].state_dict())
    torch.save(state, tmp_path / "w.pth")
    built = make_method(config.method, config.encoder, 32, 0)
    initialise(built, initial_weights(config, built.encoder).weights)
    for network in (built.encoder, built.key_encoder):
        assert torch.equal(network.state_dict()["layers.0.weight"], state["layers.0.weight"])


@pytest.mark.parametrize("heads", [12, 3])
def test_a_folder_of_timm_is_read_with_its_heads(heads: int, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("timm")
    exported = source_of("vit_tiny", vit=VisionTransformerOptions(vit_heads=12))
    FORMATS["timm"].write(exported, tmp_path / "folder")
    config = make_config("moco", data="d", arch="vit_tiny", size=32, vit_heads=heads, init=str(tmp_path / "folder"))
    encoder, _ = make_encoder(config.encoder, 32)
    if heads == 12:
        found = initial_weights(config, encoder)
        assert found.line == f"--init {tmp_path}/folder: 150 of 150 tensors of the encoder taken"
        assert torch.equal(found.weights["conv_proj.weight"], exported.encoder.state_dict()["conv_proj.weight"])
    else:
        with pytest.raises(UserError, match="12 heads, this encoder's 3"):
            initial_weights(config, encoder)


def test_tensors_of_another_network_of_timm_are_told(tmp_path: pathlib.Path) -> None:
    timm = pytest.importorskip("timm")
    timm.models.save_for_hf(timm.create_model("tf_efficientnet_b0"), tmp_path, safe_serialization=True)
    for name, told in (("efficientnet_b0", True), ("tf_efficientnet_b0.ns_jft_in1k", False)):
        config = make_config("moco", data="d", arch=f"timm:{name}", size=32, init=str(tmp_path))
        line = initial_weights(config, make_encoder(config.encoder, 32)[0]).line
        assert ("they are tf_efficientnet_b0's, which may compute something else" in line) == told


def test_a_checkpoint_is_told_from_within_its_folder(source: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved_checkpoints(source / "checkpoints")[0]
    monkeypatch.chdir(checkpoint.parent)
    config = make_config("moco", data="d", arch="small", size=16, init=checkpoint.name)
    assert initial_weights(config, make_encoder(SMALL, 16)[0]).record["source"] == str(checkpoint)


def test_runs_of_other_methods_give_the_encoder_that_is_evaluated(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    dino = ["--arch", "small", "--size", 16, "--batch-size", 16, "--epochs", 4, "--prototypes", 32, "--dim", 16]
    words = ["--data", str(shards), "--run", str(tmp_path / "dino"), "--method", "dino", *map(str, dino)]
    assert main([*words, "--hidden", "32", "--max-steps", "2", "--lr", "8", "--warmup-epochs", "0"]) == 0
    config = make_config("moco", data="d", arch="small", size=16, init=str(tmp_path / "dino"))
    found = initial_weights(config, make_encoder(config.encoder, 16)[0]).weights
    state = final_state(tmp_path / "dino")["method"]
    assert torch.equal(found["1.conv1.weight"], state["momentum_encoder.1.conv1.weight"])
    assert not torch.equal(found["1.conv1.weight"], state["encoder.1.conv1.weight"])


def test_untrained_is_what_the_run_started_from(
    source: pathlib.Path, shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_file(tmp_path)
    run = tmp_path / "run"
    assert train(shards, run, "--init", weights, *STILL) == 0
    words = [str(run), "--knn", "--untrained", "--workers", "1"]
    assert evaluate.main(words) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"knn_top1", "knn_top1_untrained"} <= figures.keys()
    torch.save(moved(torch.load(weights)["state_dict"]), weights)
    assert evaluate.main(words) == 2
    assert "has changed since" in one_line_of(capsys.readouterr().err)
    weights.unlink()
    assert evaluate.main(words) == 2
    assert "started from can't be had" in one_line_of(capsys.readouterr().err)
    assert evaluate.main([str(run), "--knn", "--workers", "1"]) == 0


def test_ranks_start_from_the_same_weights(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    weights = random_file(tmp_path)
    done = train_on_ranks(tmp_path, 2, shards, tmp_path / "run", "--init", weights, *STILL, "--batch-norm", "plain")
    assert [each.returncode for each in done] == [0, 0], done
    lines = [line for each in done for line in each.stderr.splitlines() if line.startswith("--init ")]
    assert len(lines) == 1
    expected = torch.load(weights)["state_dict"]["1.conv1.weight"]
    torch.testing.assert_close(first_weights(tmp_path / "run")["1.conv1.weight"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "option"), [("moco", "init"), ("simclr", "anchor")])
def test_a_rank_that_reads_another_file_ends(method: str, option: str, tmp_path: pathlib.Path) -> None:
    class Second(Ranks):
        rank, world_size = 1, 1

        def __init__(self) -> None:
            pass

        def share(self, value: Any) -> Any:
            return "of the first process's file"

    config = make_config(method, data="d", arch="small", size=16, **{option: str(random_file(tmp_path))})
    with pytest.raises(UserError, match=f"--{option} .* is another file than the first process reads"):
        all_initial_weights(config, make_encoder(SMALL, 16)[0], Second())
