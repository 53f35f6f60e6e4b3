"""Training, evaluation and views from shards behind a URL, whatever their server does."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.launch import train, train_on_ranks
from support.web import Web, web_server

from fasttrain import ViewLoader
from fasttrain.dataprep.convert import main as convert
from fasttrain.embed import main as embed
from fasttrain.evaluate import main as evaluate
from fasttrain.input import Order, ThreadLoader, choose_shuffle, evenly, located, open_dataset, seems_labelled
from fasttrain.input.options import CacheOptions
from fasttrain.input.stores import BlockStore, Shards
from fasttrain.run.checkpoint import load_checkpoint, saved_checkpoints
from fasttrain.run.metrics import read_metrics
from fasttrain.storage import attempts, bounded_folder
from fasttrain.system import watch
from fasttrain.system.errors import DataError
from fasttrain.system.watch import ARRIVALS

SHARDS = 12  # of train, with 6 images each
BLOCKS = "--shuffle", "block", "--shuffle-window", "4"
PLAIN = *BLOCKS, "--health-every", "0"


@pytest.fixture(scope="module", params=["ffcv", "webdataset"])
def small(request: pytest.FixtureRequest, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image_folder in shards of 6 images."""
    out = tmp_path_factory.mktemp("small") / "set"
    words = [str(image_folder), str(out), "--format", request.param, "--shard-size", "6", "--workers", "1"]
    assert convert(words) == 0
    return out


@pytest.fixture
def web(small: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server of that, whose failures cost no time."""
    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(attempts, "_told", 0)
    monkeypatch.setattr(bounded_folder, "SPARE_BYTES", 0)
    monkeypatch.setattr(ARRIVALS, "trouble", "")
    with web_server() as server:
        server.files.update({f"/set/{path.name}": path.read_bytes() for path in small.iterdir()})
        yield server


def asked(web: Web, part: str = "train-") -> list[str]:
    """Shards that were asked for, in order."""
    targets = [target.partition("?")[0].rpartition("/")[2] for _, target, _ in web.requests]
    return [name for name in targets if part in name and name.endswith((".beton", ".tar"))]


def weights(run: Path) -> dict[str, Any]:
    return load_checkpoint(saved_checkpoints(run / "checkpoints")[0]).state["method"]


def assert_same(one: Path, other: Path) -> None:
    mine, its = weights(one), weights(other)
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_from_a_url_is_the_run_from_a_folder(small: Path, web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/set?sig=secret"
    assert train(small, tmp_path / "near", *PLAIN, "--max-steps", 6) == 0
    assert train(url, tmp_path / "far", *PLAIN, "--max-steps", 6, "--cache", tmp_path / "cache") == 0
    assert_same(tmp_path / "near", tmp_path / "far")
    assert sorted(asked(web)) == sorted(set(asked(web))), "each comes once"
    record = json.loads((tmp_path / "far/config.json").read_text())
    assert record["data"]["path"] == record["config"]["data"] == f"{web.url}/set?…"
    kept = [path for path in (*(tmp_path / "far").rglob("*"), *(tmp_path / "cache").rglob("*")) if path.is_file()]
    assert not [path for path in kept if b"secret" in path.read_bytes()]


def test_auto_reads_it_by_blocks_and_says_why(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--max-steps", 2, "--shuffle-window", 5, "--cache", tmp_path / "cache")
    assert train(f"{web.url}/set", tmp_path / "run", *words) == 0
    assert f"--shuffle block, 5 shards at once: {web.url}/set is read from http" in capsys.readouterr().err


def test_a_run_survives_an_outage_that_is_shorter_than_what_has_come(small: Path, web: Web, tmp_path: Path) -> None:
    run, index = tmp_path / "far", 2 if web.files.get("/set/train-00000.tar") else 1
    assert train(small, tmp_path / "near", *PLAIN, "--max-steps", 7, "--checkpoint-every", 1) == 0
    web.served = 1 + 10 * index  # the manifest, and more than what two steps need

    def back() -> None:
        until(lambda: web.away and (run / "checkpoints/step-000000002.pt").exists())
        web.served, web.away = None, False

    helper = threading.Thread(target=back)
    helper.start()
    words = (*PLAIN, "--max-steps", 7, "--checkpoint-every", 1, "--cache", tmp_path / "cache")
    assert train(f"{web.url}/set", run, *words) == 0
    helper.join()
    assert_same(tmp_path / "near", run)


def test_a_longer_outage_ends_the_run_with_the_storages_own_error(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(watch, "WARN_SECONDS", 0.5)
    web.faults |= {f"/set/{path}": [503] * 100_000 for path in ("train-00003.beton", "train-00003.tar")}
    assert train(f"{web.url}/set", tmp_path / "run", *PLAIN, "--cache", tmp_path / "cache") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    where = re.escape(f"{web.url}/set/train-00003.")
    assert re.search(f"no sample for 1 s: storage or a worker hangs, at .*{where}.*; {where}.*: HTTP 503$", last)


def test_slow_storage_ends_no_run_and_is_told_of(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(watch, "WARN_SECONDS", 0.5)
    monkeypatch.setattr("fasttrain.input.ahead.THREADS", 1)
    web.pace = 0.1  # two seconds for a shard

    def fast() -> None:  # from the second one on
        until(lambda: len(asked(web)) > 1)
        web.pace = 0.0

    helper = threading.Thread(target=fast)
    helper.start()
    words = (*PLAIN, "--max-steps", 1, "--cache", tmp_path / "cache")
    assert train(f"{web.url}/set", tmp_path / "run", *words) == 0
    helper.join()
    told = capsys.readouterr().err
    assert f"warning: no sample for 1 s (storage is slow: bytes still come), at sample 0 of {web.url}/set/" in told


def test_a_run_goes_on_from_another_cache_and_from_a_local_copy(small: Path, web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/set"
    assert train(small, tmp_path / "near", *PLAIN, "--max-steps", 7) == 0
    assert train(url, tmp_path / "far", *PLAIN, "--max-steps", 3, "--cache", tmp_path / "a") == 0
    assert train(url, tmp_path / "far", *PLAIN, "--max-steps", 5, "--cache", tmp_path / "b", "--cache-gb", 1) == 0
    assert train(small, tmp_path / "far", *PLAIN, "--max-steps", 6) == 0
    shutil.rmtree(tmp_path / "b")
    assert train(url, tmp_path / "far", *PLAIN, "--max-steps", 7, "--cache", tmp_path / "b") == 0
    assert_same(tmp_path / "near", tmp_path / "far")


def test_a_shard_that_is_missing_is_counted_and_the_run_goes_on(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Order(72, 16, 0, lanes=4, block_S=np.arange(0, 73, 6)).step(0, 0)[0]
    number = first // 6  # the first of all, before which none was decoded
    (gone,) = (path for path in web.files if re.fullmatch(rf"/set/train-{number:05d}\.(beton|tar)", path))
    del web.files[gone]
    words = (*PLAIN, "--epochs", 1, "--log-every", 1, "--cache", tmp_path / "cache")
    assert train(f"{web.url}/set", tmp_path / "run", *words, "--max-failed-fraction", 1) == 0
    told = capsys.readouterr().err
    assert f"warning: sample 0 of {web.url}{gone}: {web.url}{gone}: not found; another takes its place" in told
    replaced = sum(entry["replaced"] for entry in read_metrics(tmp_path / "run/metrics.jsonl") if "replaced" in entry)
    assert 0 < replaced <= 10
    assert asked(web).count(gone.rpartition("/")[2]) == 1
    web.files = {path: content for path, content in web.files.items() if "train-" not in path}
    assert train(f"{web.url}/set", tmp_path / "none", *words, "--cache", tmp_path / "other", "--fresh") == 1
    assert re.search(r"no sample could be decoded in place of .*; the last: .*: not found$", capsys.readouterr().err)


def test_two_ranks_share_a_cache(small: Path, web: Web, tmp_path: Path) -> None:
    words = (*PLAIN, "--max-steps", 6, "--device", "cpu")
    for done in train_on_ranks(tmp_path, 2, small, tmp_path / "near", *words):
        assert done.returncode == 0, done.stderr
    for done in train_on_ranks(tmp_path, 2, f"{web.url}/set", tmp_path / "far", *words, "--cache", tmp_path / "cache"):
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "near", tmp_path / "far")
    assert sorted(asked(web)) == sorted(set(asked(web)))


def test_a_cache_of_half_the_set_gives_the_same_batches_and_keeps_its_bound(
    small: Path, web: Web, tmp_path: Path
) -> None:
    sizes = [len(content) for path, content in web.files.items() if "train-" in path]
    place = located(f"{web.url}/set", CacheOptions(str(tmp_path), sum(sizes) / 2 / 1e9))
    far, near = open_dataset(place), open_dataset(small)
    assert far.fingerprint == near.fingerprint
    for store in (far, near):
        assert isinstance(store, BlockStore)
    order = Order(72, 12, 3, lanes=2, block_S=near.block_S)
    for mine, its in zip(batches(far, order), batches(near, order), strict=True):
        assert mine == its
    assert max(asked(web).count(name) for name in asked(web)) > 1, "some came again in the second epoch"
    kept = sum(path.stat().st_size for path in place.path.iterdir() if path.name != "manifest.json")
    assert kept <= sum(sizes) / 2


def batches(store: Any, order: Order) -> list[tuple[list[int], bytes, int]]:
    loader = ThreadLoader(store, order, 2)
    try:
        return [
            (batch.index_B.tolist(), batch.pixels[: int(batch.offset_B[-1])].numpy().tobytes(), batch.replaced)
            for epoch in range(2)
            for batch in loader.epoch(epoch)
        ]
    finally:
        loader.close()


def test_a_cache_that_is_too_small_is_one_line_with_the_number_that_is_needed(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--cache", tmp_path / "cache", "--max-steps", 1, "--cache-gb")
    assert train(f"{web.url}/set", tmp_path / "run", *BLOCKS, *words, 1e-6) == 2
    line = capsys.readouterr().err.strip()
    found = re.search(r"--cache-gb 1e-06: 4 shards are read at once of up to .* GB, .* take ([0-9.e-]+) GB", line)
    assert found
    assert "\n" not in line
    assert train(f"{web.url}/set", tmp_path / "run", *BLOCKS, *words, 1.1 * float(found[1])) == 0
    capsys.readouterr()
    assert train(f"{web.url}/set", tmp_path / "all", "--shuffle", "global", *words, float(found[1])) == 0
    assert "--shuffle global needs all shards all the time" in capsys.readouterr().err


def test_views_over_a_url_are_those_of_a_folder(small: Path, web: Web, tmp_path: Path) -> None:
    near = ViewLoader(small, size=16, shuffle="block", batch_size=12, device="cpu", workers=1)
    far = ViewLoader(f"{web.url}/set", size=16, shuffle="block", batch_size=12, device="cpu", workers=1, cache=tmp_path)
    for mine, its in zip(far, near, strict=True):
        assert mine.index_B.tolist() == its.index_B.tolist()
        assert torch.equal(mine.views[0], its.views[0])
    assert far.mean == near.mean
    far.close()
    near.close()


def test_figures_and_features_over_a_url_are_those_of_a_folder(
    small: Path, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cached = tmp_path / "run", ("--cache", str(tmp_path / "cache"))
    assert train(f"{web.url}/set", run, *PLAIN, "--max-steps", 2, *cached) == 0
    figures, features = [], []
    for words in (["--data", str(small)], ["--data", f"{web.url}/set", *cached], cached, ()):  # (): the run's cache
        capsys.readouterr()
        assert evaluate([str(run), *words, "--knn", "--k", "3"]) == 0
        figures.append(json.loads(capsys.readouterr().out.splitlines()[-1])["knn_top1"])
    transfer = ["--data", str(small), "--transfer", f"{web.url}/set", *cached]
    assert evaluate([str(run), *transfer, "--knn", "--k", "3"]) == 0
    figures.append(json.loads(capsys.readouterr().out.splitlines()[-1])["knn_on_set_top1"])
    assert figures == figures[:1] * 5
    for number, images in enumerate((str(small), f"{web.url}/set")):
        assert embed([str(run), images, str(tmp_path / f"{number}.npy")]) == 0
        features.append(np.load(tmp_path / f"{number}.npy"))
    assert np.array_equal(*features)
    assert max(web.requests.count(request) for request in web.requests if "manifest" not in request[1]) == 1


def test_a_command_on_a_run_takes_its_cache_with_its_bound(tmp_path: Path) -> None:
    training = CacheOptions(str(tmp_path), 500.0)
    assert CacheOptions().after(training) == training
    assert CacheOptions(str(tmp_path)).after(training) == training, "a smaller bound would remove what training fetched"
    assert CacheOptions(cache_gb=7.0).after(training) == CacheOptions(str(tmp_path), 7.0)
    other = CacheOptions("/another", 7.0)
    assert other.after(training) == other
    assert CacheOptions().after(CacheOptions(str(tmp_path / "of another machine"), 500.0)) == CacheOptions()


def test_a_few_samples_of_a_set_elsewhere_are_of_few_shards(web: Web, tmp_path: Path) -> None:
    place = located(f"{web.url}/set", CacheOptions(str(tmp_path)))
    store = open_dataset(place)
    assert isinstance(store, Shards)
    assert not asked(web), "nothing comes but the manifest"
    assert seems_labelled(store)
    assert len(asked(web)) <= 12
    few = evenly(store, 3)
    assert few.num_samples == 3
    assert len({store.locate(int(index))[0] for index in few._index}) <= 2
    everything = evenly(store, 1000)
    assert everything._index.tolist() == list(range(72))
    assert isinstance(everything, BlockStore)
    assert everything.block_S.tolist() == store.block_S.tolist()
    everything.fetch(6, 12)
    assert choose_shuffle(store, place, "auto", 64).lanes == SHARDS


@pytest.mark.parametrize(("kind", "shuffle"), [("dali", "block"), ("dali", "global"), ("resident", "block")])
def test_the_other_loaders_read_a_set_elsewhere_as_a_folder(
    small: Path, web: Web, tmp_path: Path, kind: str, shuffle: str
) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    words = ("--shuffle", shuffle, "--shuffle-window", "2", "--health-every", "0", "--max-steps", 6)
    assert train(small, tmp_path / "near", *words) == 0
    half = sum(len(content) for path, content in web.files.items() if "train-" in path) / 2 / 1e9
    cached = ("--cache", tmp_path / "cache", "--cache-gb", half)
    assert train(f"{web.url}/set", tmp_path / "far", *words, *cached, "--loader", kind) == 0
    assert_same(tmp_path / "near", tmp_path / "far")


def test_a_look_at_labels_does_not_wait_for_storage_for_ever(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "STALL_SECONDS", 1.0)
    web.served = 1
    assert train(f"{web.url}/set", tmp_path / "run", *PLAIN, "--online-probe", "--cache", tmp_path / "cache") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"no label for 1 s: storage or a worker hangs, at sample .*/set/train-", last)


def test_a_url_of_this_machine_is_a_folder_and_plain_images_are_not_read_from_elsewhere(
    small: Path, web: Web, tmp_path: Path
) -> None:
    assert located(f"file://{small}").real == str(small)
    assert open_dataset(f"file://{small}").num_samples == 72
    place = located(f"{web.url}/set", CacheOptions(str(tmp_path)))
    with pytest.raises(DataError, match="--loader folder is for images on this machine"):
        open_dataset(place, "train", "folder")
    with pytest.raises(DataError, match=f"{web.url}/set has no 'test' split"):
        open_dataset(place, "test")
