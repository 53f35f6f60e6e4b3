"""Features on disk: whose they are, in which order, and what is left when something ends the command."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import one_line_of
from support.forks import RunCommand, finished
from support.launch import train
from torchvision.models.swin_transformer import SwinTransformer

from fasttrain import embed
from fasttrain.evaluation.features import Preparation, central_views, extract
from fasttrain.formats import embedding
from fasttrain.formats.beton import BetonReader
from fasttrain.input import open_dataset
from fasttrain.jobs import unfinished
from fasttrain.jobs.unfinished import Unfinished, folder_of
from fasttrain.networks.layer import Layer
from fasttrain.run.checkpoint import saved_checkpoints
from fasttrain.system.errors import EXIT_SKIPPED, EXIT_USER_ERROR, UserError
from fasttrain.trained import Trained, load_trained


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert train(shards, path, "--max-steps", 2, "--checkpoint-every", 1) == 0
    return path


def embedded(run: Path, images: Path, out: Path, *more: object, status: int = 0) -> np.ndarray:
    words = [run, images, out, "--batch-size", "16", "--workers", "1", *more]
    assert embed.main(list(map(str, words))) == status
    return np.load(out)


def lines_of(out: Path) -> list[list[str]]:
    head, *lines = [line.split("\t") for line in out.with_suffix(".tsv").read_text().splitlines()]
    assert head == ["name", "split", "label", "class"]
    return lines


def views_of(trained: Trained, data: Path, split: str) -> torch.Tensor:
    size, _, mean, std = trained.preprocessing
    store = open_dataset(data, split, view_size=size)
    options = {"size": size, "mean": mean, "std": std, "batch_size": 16, "workers": 1, "max_failed_fraction": 0.0}
    return torch.cat([views.clone() for _, views in central_views(store, torch.device("cpu"), **options)])


def expected(run: Path, data: Path, split: str) -> np.ndarray:
    """By a plain forward pass."""
    trained = load_trained(run)
    return trained.encoder(views_of(trained, data, split)).numpy()


def test_rows_are_the_encoders_features_in_the_order_of_the_data_set(run: Path, shards: Path, tmp_path: Path) -> None:
    found = embedded(run, shards, out := tmp_path / "new/folder/out.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:72], expected(run, shards, "train"), atol=1e-5)
    np.testing.assert_allclose(found[72:], expected(run, shards, "val"), atol=1e-5)
    lines = lines_of(out)
    assert [line[1] for line in lines] == ["train"] * 72 + ["val"] * 24
    assert [line[0] for line in lines[:30]] == (shards / "train-00000.names").read_text().splitlines()
    assert [int(line[2]) for line in lines[:30]] == BetonReader(shards / "train-00000.beton").label_N.tolist()
    assert all(name.split("/")[-2] == kind for name, _, _, kind in lines)
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["checkpoint"] == load_trained(run).digest
    assert (about["step"], about["images"], about["width"], about["failed"]) == (2, 96, 256, [])
    assert about["preprocessing"]["size"] == 16
    assert sorted(os.listdir(out.parent)) == ["out.json", "out.npy", "out.tsv"]


def test_features_are_those_that_an_evaluation_compares(run: Path, shards: Path, tmp_path: Path) -> None:
    found = embedded(run, shards, tmp_path / "out.npy", "--split", "val")
    trained = load_trained(run)
    size, _, mean, std = trained.preprocessing
    features = extract(
        trained.encoder, open_dataset(shards, "val", view_size=size), tmp_path, torch.device("cpu"),
        Preparation(size, mean, std, 16, 1, 0.0),
    )  # fmt: skip
    assert np.array_equal(found, features.values_NF)
    rounded = embedded(run, shards, tmp_path / "bf16.npy", "--split", "val", "--precision", "bf16")
    assert 1e-4 < np.linalg.norm(rounded - found) / np.linalg.norm(found) < 0.02


def test_parquet_holds_the_same(run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(embedding, "ROWS_AT_ONCE", 40)
    found = embedded(run, shards, tmp_path / "out.npy")
    words = [run, shards, tmp_path / "out.parquet", "--batch-size", "16"]
    assert embed.main(list(map(str, words))) == 0
    table = parquet.read_table(tmp_path / "out.parquet")
    assert parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups == 3
    assert np.array_equal(np.stack(table["feature"].to_numpy()), found)
    columns = table.drop(["feature"]).to_pydict()
    assert [[str(v) for v in row] for row in zip(*columns.values(), strict=True)] == lines_of(tmp_path / "out.npy")
    about = json.loads(table.schema.metadata[b"fasttrain"])
    assert about == json.loads((tmp_path / "out.json").read_text())


def test_files_are_read_as_shards_are(
    run: Path, image_folder: Path, tar_shards: Path, shards: Path, tmp_path: Path
) -> None:
    by_name = []
    for source in (image_folder, tar_shards, shards):
        found = embedded(run, source, out := tmp_path / f"{len(by_name)}.npy", "--normalize")
        assert len(found) == 96
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        names = [f"{split}/{Path(name).parent.name}/{Path(name).name}" for name, split, _, _ in lines_of(out)]
        by_name.append(found[np.argsort(names)])
        assert len(set(names)) == 96
    np.testing.assert_allclose(by_name[1], by_name[2], atol=1e-5)
    # Of files the larger ones are decoded at half their size; under its name, each is still nearest to itself.
    assert (by_name[0] @ by_name[2].T).argmax(1).tolist() == list(range(96))


def test_a_flat_folder_has_no_labels_and_one_split(
    run: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded(run, image_folder / "train/class1", out := tmp_path / "out.npy")
    assert lines_of(out) == [[f"{i:03d}.jpg", "train", "", ""] for i in range(18)]
    words = [run, image_folder / "train/class1", tmp_path / "val.npy", "--split", "val"]
    assert embed.main(list(map(str, words))) == EXIT_USER_ERROR
    assert "has no 'val' split; it has: train" in one_line_of(capsys.readouterr().err)


def test_an_image_that_cannot_be_read_has_no_row_and_is_named(
    run: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(image_folder / "train", tmp_path / "data")
    whole = embedded(run, data, tmp_path / "whole.npy")
    (data / "class1/003.jpg").write_bytes(b"no image")  # has no size
    damaged = data / "class2/007.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-400])  # can't be decoded
    capsys.readouterr()
    found = embedded(run, data, out := tmp_path / "out.npy", status=EXIT_SKIPPED)
    lost = [18 + 3, 36 + 7]
    assert np.array_equal(found, np.delete(whole, lost, 0))
    names = [line[0] for line in lines_of(out)]
    assert names == np.delete([line[0] for line in lines_of(tmp_path / "whole.npy")], lost).tolist()
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["failed"] == 2
    assert said.err.count("left out") == 2
    failed = json.loads(out.with_suffix(".json").read_text())["failed"]
    assert [(each["name"], each["index"]) for each in failed] == [("class1/003.jpg", 21), ("class2/007.jpg", 43)]
    assert embed.main(list(map(str, [run, data, out, "--batch-size", "16"]))) == EXIT_SKIPPED  # done already


def test_where_nothing_can_be_read_nothing_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / f"data/{number}.jpg").write_bytes(b"no image")
    words = [run, tmp_path / "data", tmp_path / "out.npy"]
    assert embed.main(list(map(str, words))) == EXIT_USER_ERROR
    assert "no image can be read; the first is 0.jpg" in one_line_of(capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["data"]


def test_storage_that_goes_away_ends_it_and_what_is_done_is_kept(
    run: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(image_folder / "train", tmp_path / "data")
    whole = embedded(run, data, tmp_path / "whole.npy")
    for path in data.glob("class[23]/*"):
        path.rename(path.with_suffix(".gone"))
        path.symlink_to(path.with_suffix(".gone"))  # of the same size in the listing
    append = Unfinished.append

    def and_unmount(self: Unfinished, *batch: object) -> None:
        append(self, *batch)  # type: ignore[arg-type]
        for path in data.glob("class[23]/*.gone"):
            path.rename(path.with_suffix(".away"))

    monkeypatch.setattr(unfinished, "SAVE_SECONDS", 0.0)
    words = list(map(str, [run, data, tmp_path / "out.npy", "--batch-size", "12", "--workers", "1"]))
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "append", and_unmount)
        assert embed.main(words) == 1
    for path in data.glob("class[23]/*.away"):
        path.rename(path.with_suffix(".gone"))
    assert embed.main(words) in (0, EXIT_SKIPPED)  # the batch in which it went away has left some out
    assert len(np.load(tmp_path / "out.npy")) > len(whole) - 12


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("moment", ["batch 3", "batch 7", "the end"])
def test_killed_at_any_moment_the_same_command_ends_in_the_same_bytes(
    run: Path, shards: Path, image_folder: Path, tmp_path: Path, moment: str, suffix: str
) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    (data / "train/class0/002.jpg").write_bytes(b"no image")
    out, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    words = [str(run), str(data), str(out), "--batch-size", "16", "--workers", "1"]
    done = finished(tmp_path, killed, words, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert folder_of(out).is_dir()
    assert embed.main([*words, "--normalize"]) == EXIT_USER_ERROR
    assert embed.main(words) == EXIT_SKIPPED
    words[2] = str(whole)
    assert embed.main(words) == EXIT_SKIPPED
    for path in tmp_path.glob("out.*"):
        assert path.read_bytes() == path.with_stem("whole").read_bytes(), path
    assert not folder_of(out).exists()


def killed(words: list[str], moment: str) -> int:
    """Embed, but for the end of the process: in the middle of a batch's rows, or before the file gets its name."""
    unfinished.SAVE_SECONDS = 0.0
    append, left = Unfinished.append, int(moment.split()[1]) if moment != "the end" else 0

    def killing(self: Unfinished, rows_NF: np.ndarray, *rest: object) -> None:
        nonlocal left
        left -= 1
        append(self, rows_NF, *rest)  # type: ignore[arg-type]
        self._saving.result()
        if not left:
            self._features.write(b"half a row")
            self._features.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    Unfinished.append = killing  # type: ignore[method-assign]
    if not left:
        embedding.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        embedding._write_parquet = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    return embed.main(words)


@pytest.mark.parametrize("converted", ["shards", "tar_shards"])
def test_names_of_another_conversion_are_not_put_beside_the_rows(
    run: Path, converted: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = shutil.copytree(request.getfixturevalue(converted), tmp_path / "data")
    append = Unfinished.append

    def and_swap_two_names(self: Unfinished, *batch: object) -> None:
        append(self, *batch)  # type: ignore[arg-type]
        (path, *_) = sorted(data.glob("*.names"))
        first, second, *others = path.read_text().splitlines(keepends=True)
        path.write_text("".join([second, first, *others]))
        monkeypatch.setattr(Unfinished, "append", append)

    monkeypatch.setattr(Unfinished, "append", and_swap_two_names)
    assert embed.main([str(run), str(data), str(out := tmp_path / "out.npy"), "--workers", "1"]) == EXIT_USER_ERROR
    assert "not the names that the manifest tells of" in one_line_of(capsys.readouterr().err)
    assert not out.exists()


def test_a_resumed_one_computes_only_what_is_missing(run: Path, shards: Path, tmp_path: Path) -> None:
    words = [str(run), str(shards), str(tmp_path / "out.npy"), "--batch-size", "16", "--workers", "1"]
    finished(tmp_path, killed, words, "batch 6")  # 5 are of train, whose last is half full
    progress = json.loads((folder_of(tmp_path / "out.npy") / "progress.json").read_text())
    assert (progress["batches"], progress["images"]) in ((6, 88), (5, 72))


def test_other_settings_are_refused_and_the_same_are_done(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded(run, shards, out := tmp_path / "out.npy")
    before = out.stat().st_mtime_ns
    embedded(run, shards, out)
    assert out.stat().st_mtime_ns == before
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images_per_sec"] == 0
    for other, said in ((["--normalize"], "normalize was False, now True"), (["--split", "val"], "splits was")):
        embedded(run, shards, out, *other, status=EXIT_USER_ERROR)
        assert said in one_line_of(capsys.readouterr().err)
    first = saved_checkpoints(run / "checkpoints")[-1]
    embedded(run, shards, out, "--checkpoint", first, status=EXIT_USER_ERROR)
    assert "step was 2, now 1" in one_line_of(capsys.readouterr().err)
    assert not np.array_equal(np.load(out), embedded(run, shards, tmp_path / "first.npy", "--checkpoint", first))


def test_rows_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    with Unfinished(tmp_path / "out.npy", {}, {}, 2) as begun:
        begun.append(np.array([[1, 2], [np.nan, 1], [np.inf, 0]], np.float32), np.zeros(3), [])
        assert begun.complete()["not_finite"] == 2


def test_best_is_the_checkpoint_of_that_name(run: Path, shards: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    first = saved_checkpoints(other / "checkpoints")[-1]
    shutil.copy(first, other / "checkpoints/best.pt")
    best = embedded(other, shards, tmp_path / "best.npy", "--best")
    assert np.array_equal(best, embedded(run, shards, tmp_path / "first.npy", "--checkpoint", first))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out.h5"], "ends in .npy or .parquet"),
        (["out.npy", "--layer", "3.bn3"], "it has 3.bn2, 3.bn1"),
        (["beside.npy"], "beside.tsv, which would lie beside beside.npy, is there already"),
        (["out.npy", "--best", "--checkpoint", "x.pt"], "two checkpoints"),
        (["there.npy"], "was not written by this command"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Path, shards: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for mine in ("there.npy", "beside.tsv"):
        (tmp_path / mine).write_bytes(b"mine")
    assert embed.main([str(run), str(shards), str(tmp_path / words[0]), *words[1:]]) == EXIT_USER_ERROR
    assert said in one_line_of(capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == ["beside.tsv", "there.npy"]


def test_several_processes_are_refused_by_one_of_them(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert embed.main([str(run), str(shards), str(tmp_path / "out.npy")]) == EXIT_USER_ERROR
    assert "without torchrun" in one_line_of(capsys.readouterr().err)


def test_a_second_process_is_refused(
    run: Path, shards: Path, tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.npy"
    with Unfinished(out, {}, {}, 1):
        done = run_command("fasttrain/embed.py", run, shards, out)
    assert done.returncode == EXIT_USER_ERROR
    assert "another process is writing it" in one_line_of(done.stderr)


def test_the_projection_is_the_heads_output(run: Path, shards: Path, tmp_path: Path) -> None:
    found = embedded(run, shards, tmp_path / "out.npy", "--split", "val", "--layer", "projection")
    encoder_features = torch.from_numpy(expected(run, shards, "val"))
    trained = load_trained(run)
    np.testing.assert_allclose(found, trained.projector(encoder_features).numpy(), atol=1e-5)
    assert found.shape == (24, 16)


def test_a_layers_map_is_averaged_over_its_positions(run: Path, shards: Path, tmp_path: Path) -> None:
    found = embedded(run, shards, tmp_path / "out.npy", "--split", "val", "--layer", "3.bn2")
    trained = load_trained(run)
    block = trained.encoder[3]
    x = views_of(trained, shards, "val")
    for module in list(trained.encoder)[:3]:
        x = module(x)
    out = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))  # before the block adds to it in place
    np.testing.assert_allclose(found, out.mean((2, 3)).numpy(), atol=1e-5)


class Tokens(torch.nn.Module):
    """(N, 3, S, S) → (N, D), by tokens."""

    def __init__(self, classes: bool) -> None:
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 3)) if classes else None
        self.patches, self.block, self.again, self.unused = (torch.nn.Identity() for _ in range(4))

    def forward(self, x_N3SS: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x_N3SS.flatten(2).mT)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), 1, 3), tokens], 1)
        return self.again(self.again(self.block(tokens)))[:, 0]


def test_of_tokens_the_class_token_is_taken_or_their_mean() -> None:
    x = torch.randn(5, 3, 4, 4)
    tokens, encoder = x.flatten(2).mT, Tokens(True)
    torch.nn.init.normal_(token := encoder.cls_token)  # type: ignore[arg-type]
    before = token.clone()  # type: ignore[union-attr]
    assert torch.equal(Layer(encoder, "block", 4)(x), before[0].expand(5, 3))
    assert torch.equal(encoder.cls_token, before)  # type: ignore[arg-type]
    assert torch.allclose(Layer(Tokens(False), "block", 4)(x), tokens.mean(1))
    for name, said in (("again", "runs 2 times"), ("unused", "is not run"), ("blok", "it has block")):
        with pytest.raises(UserError, match=said):
            Layer(Tokens(True), name, 4)


def test_where_the_class_token_is_not_among_the_tokens_their_mean_is_taken() -> None:
    x = torch.randn(5, 3, 4, 4)
    layer = Layer(Tokens(True), "patches", 4)
    assert torch.allclose(layer(x), x.flatten(2).mT.mean(1))
    assert layer.about == "patches gives (16, 3) an image: the mean of the tokens is taken"


@pytest.mark.parametrize(("name", "last"), [("features.1", True), ("features.3", True), ("permute", False)])
def test_of_a_map_with_its_channels_last_the_positions_are_averaged_too(name: str, last: bool) -> None:
    encoder = SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4]).eval()
    maps: list[torch.Tensor] = []
    encoder.get_submodule(name).register_forward_hook(lambda _module, _inputs, out: maps.append(out))
    x = torch.randn(2, 3, 32, 32)
    found = Layer(encoder, name, 32)(x)
    assert torch.allclose(found, maps[-1].mean((1, 2) if last else (2, 3)), atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 4, 4), (2, 3, 4)])
def test_a_map_whose_shape_tells_nothing_is_refused(shape: tuple[int, ...]) -> None:
    encoder = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.LazyLinear(math.prod(shape)), torch.nn.Unflatten(1, shape)
    )
    with pytest.raises(UserError, match="does not tell channels from positions"):
        Layer(encoder, "2", 4)


def test_an_archive_or_a_folder_of_them_is_to_be_converted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data/train").mkdir(parents=True)
    for name in ("data/a.tar", "data/train/b.tar", "data/train/c.parquet", "d.zip"):
        (tmp_path / name).write_bytes(b"")
    for name in ("data", "data/train", "data/a.tar", "d.zip"):
        assert embed.main([str(run), str(tmp_path / name), str(tmp_path / "out.npy")]) == EXIT_USER_ERROR
        assert "by dataprep/convert.py" in one_line_of(capsys.readouterr().err)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "write_json", full)
        embedded_words = [str(run), str(shards), str(tmp_path / "out.npy"), "--batch-size", "16"]
        assert embed.main(embedded_words) == 1
        assert "disk full" in one_line_of(capsys.readouterr().err)
    assert embed.main(embedded_words) == 0


def test_a_name_with_a_tab_stays_on_its_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "data/a\tb.png")
    embedded(run, tmp_path / "data", out := tmp_path / "out.npy")
    assert lines_of(out) == [["a\\x09b.png", "train", "", ""]]
