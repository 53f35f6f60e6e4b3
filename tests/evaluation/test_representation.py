"""What is kept of a representation: computed as the slow way has it, and read again whole or not at all."""

import dataclasses
import io
import os
import pathlib
import resource
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from support.features import in_memory
from support.loading import Numbers
from support.representation import represented

from fasttrain.evaluation import maps as library_maps
from fasttrain.evaluation import representation
from fasttrain.evaluation.features import Features, Preparation
from fasttrain.evaluation.maps import maps, principal
from fasttrain.evaluation.representation import confused, keep_representation, nearest, represent, sampled
from fasttrain.run.representation import FILE, Representation, read_representation, write_representation
from fasttrain.system.errors import DataError

CPU = torch.device("cpu")
PREPARATION = Preparation(16, (0.5,) * 3, (0.5,) * 3, 8, 1, 0.1)


def features(count: int, seed: int = 0, classes: int = 4, width: int = 6) -> Features:
    """Heaps, one for each class."""
    generator = np.random.default_rng(seed)
    label_N = np.arange(count) % classes
    return in_memory(3 * np.eye(classes, width)[label_N] + generator.normal(size=(count, width)), label_N)


def numbers(count: int, **changes: object) -> Numbers:
    """Image i has the colour i."""
    store = Numbers(count, **changes)  # type: ignore[arg-type]
    store.classes, store.fingerprint = tuple("abcd"), ""  # type: ignore[attr-defined,assignment]
    return store


def kept_of(memory: Features, queries: Features, **changes: object) -> Representation:
    ranked = {"knn": torch.zeros(len(queries), 1, dtype=torch.int64), "linear": queries.label_N[:, None].clone()}
    ranked["linear"][::5, 0] = 3
    stores = numbers(len(memory)), numbers(len(queries), **changes)
    return represent(
        memory, queries, *stores, ranked, PREPARATION, CPU, step=7, data="/data", features="encoder"
    )  # fmt: skip


def colour(jpeg: bytes) -> float:
    with Image.open(io.BytesIO(jpeg)) as picture:
        return float(np.asarray(picture).mean())


@pytest.mark.parametrize("shape", [(40, 7), (9, 25)])
def test_principal_components_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    x_NF = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1)
    component_ND, variance_D = principal(torch.from_numpy(x_NF), 4)
    u_NN, value_N, _ = np.linalg.svd(x_NF - x_NF.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(component_ND.numpy()), np.abs(u_NN[:, :4] * value_N[:4]), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(variance_D.numpy(), (value_N**2 / (value_N**2).sum())[:4], rtol=1e-8)
    largest_D = component_ND.gather(0, component_ND.abs().argmax(0, keepdim=True))[0]
    assert (largest_D > 0).all()


def test_maps_are_the_same_each_time_and_say_what_they_are() -> None:
    x_NF = features(60).rows(slice(None), CPU)
    first, second = maps(x_NF), maps(x_NF)
    assert first.names == second.names
    assert first.names[0] == "PCA"
    np.testing.assert_array_equal(first.map_MN2, second.map_MN2)
    assert first.map_MN2.shape == (len(first.names), 60, 2)
    assert first.map_MN2.dtype == np.float32


def test_a_map_by_t_sne_keeps_heaps_apart() -> None:
    pytest.importorskip("sklearn")
    found = features(80)
    drawn = maps(found.rows(slice(None), CPU))
    map_N2 = drawn.map_MN2[drawn.names.index("t-SNE")]
    distance_NN = np.linalg.norm(map_N2[:, None] - map_N2[None], axis=2) + np.diag(np.full(80, np.inf))
    same_N = found.label_N.numpy()[distance_NN.argmin(1)] == found.label_N.numpy()
    assert same_N.mean() > 0.8


@pytest.mark.parametrize("x_NF", [torch.ones(30, 4), torch.zeros(30, 4), torch.randn(1, 4), torch.ones(30, 1)])
def test_features_without_any_spread_have_a_map_of_one_place(x_NF: torch.Tensor) -> None:
    found = maps(x_NF)
    assert found.names == ("PCA",)
    assert not found.map_MN2.any()


def test_a_library_that_fails_costs_its_map_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "umap", types.ModuleType("umap"))  # of another package by the same name
    monkeypatch.setitem(library_maps._LIBRARIES, "t-SNE", ("none", "no_such_module", library_maps._tsne))
    assert maps(features(60).rows(slice(None), CPU)).names == ("PCA",)
    assert capsys.readouterr().err.startswith("warning: no map by UMAP: umap-learn failed: AttributeError")


def test_neighbours_are_those_of_all_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representation, "MEMORY_ROWS", 7)
    memory, query_QF = features(40), features(5, seed=1).rows(slice(None), CPU)
    similarity_QK, place_QK = nearest(query_QF, memory, 6)
    memory_NF = memory.values_NF[:] / np.linalg.norm(memory.values_NF[:], axis=1, keepdims=True)
    all_QN = (query_QF / query_QF.norm(dim=1, keepdim=True)).numpy() @ memory_NF.T
    np.testing.assert_array_equal(place_QK, np.argsort(-all_QN, axis=1)[:, :6])
    np.testing.assert_allclose(similarity_QK, -np.sort(-all_QN, axis=1)[:, :6], rtol=1e-5)
    assert nearest(query_QF, features(4), 6)[1].shape == (5, 4)


def test_confusions_are_those_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    label_N, predicted_N = generator.integers(-1, 5, 300), generator.integers(-1, 5, 300)
    expected_CC = np.zeros((5, 5), int)
    for label, predicted in zip(label_N, predicted_N, strict=True):
        if label >= 0 and predicted >= 0:
            expected_CC[label, predicted] += 1
    confusion_CC, pair_P3 = confused(label_N, predicted_N, 5)
    np.testing.assert_array_equal(confusion_CC, expected_CC)
    mistakes = sorted((-expected_CC[i, j], i, j) for i in range(5) for j in range(5) if i != j)
    assert pair_P3.tolist() == [[i, j, -count] for count, i, j in mistakes]


def test_of_many_classes_the_most_frequent_mistakes_are_kept() -> None:
    label_N = np.repeat(np.arange(1000), 3)
    predicted_N = np.where(label_N == 417, 3, label_N)
    predicted_N[0] = 999
    confusion_CC, pair_P3 = confused(label_N, predicted_N, 1000)
    assert confusion_CC.shape == (0, 0)
    assert pair_P3.tolist() == [[417, 3, 3], [0, 999, 1]]


def test_queries_are_of_all_classes_and_some_are_wrong() -> None:
    label_N = np.repeat(np.arange(3), 50)
    predicted_N = label_N.copy()
    predicted_N[[7, 60, 61, 140]] = (1, 2, 0, 1)
    places = sampled(label_N, predicted_N, 9)
    assert len(set(places.tolist())) == 9
    assert np.bincount(label_N[places]).tolist() == [3, 3, 3]
    assert 140 in places
    np.testing.assert_array_equal(places, sampled(label_N, predicted_N, 9))
    assert sampled(np.array([0, 0]), np.array([0, 0]), 9).size == 2
    assert np.ptp(sampled(np.arange(1000), np.arange(1000), 9)) == 999


def test_pictures_are_of_the_images_that_the_features_are_of() -> None:
    """Features know images that could be read alone; the others keep their numbers in the store."""
    memory, queries = features(40), features(24, seed=1)
    kept = kept_of(memory, queries)
    assert kept.predicted_by == "linear"
    places = sampled(queries.label_N.numpy(), kept.predicted_N, 9)
    _, neighbour_QK = nearest(queries.rows(places, CPU), memory, 6)
    expected = np.concatenate([places[:, None], neighbour_QK], axis=1).ravel()
    np.testing.assert_allclose([colour(picture) for picture in kept.thumbnails], expected, atol=2)
    np.testing.assert_array_equal(kept.neighbour_label_QK, memory.label_N.numpy()[neighbour_QK])
    assert kept.right_C.sum() == kept.confusion_CC.trace() == (queries.label_N.numpy() == kept.predicted_N).sum()
    gaps = dataclasses.replace(
        queries, index_M=np.arange(24) + 8, values_NF=np.pad(queries.values_NF[:], ((8, 0), (0, 0)))
    )
    ranked = {"knn": queries.label_N[:, None]}
    moved = represent(memory, gaps, numbers(40), numbers(32), ranked, PREPARATION, CPU, step=7, data="", features="")
    assert colour(moved.views[0]) == pytest.approx(8, abs=2)


def test_an_image_that_can_no_longer_be_read_is_black_and_moves_no_other() -> None:
    kept = kept_of(features(40), features(24, seed=1), broken=[23])
    whole, view = kept.views[-2:]
    assert colour(whole) == colour(view) == 0
    assert colour(kept.views[-4]) == pytest.approx(18, abs=2)


def test_it_is_read_as_it_was_kept_and_the_same_each_time(tmp_path: pathlib.Path) -> None:
    kept = kept_of(features(40), features(24, seed=1))
    write_representation(tmp_path, kept)
    first = (tmp_path / FILE).read_bytes()
    found = read_representation(tmp_path)
    assert found is not None
    for field in dataclasses.fields(Representation):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(kept, field.name))
    write_representation(tmp_path, kept_of(features(40), features(24, seed=1)))
    with zipfile.ZipFile(io.BytesIO(first)) as old, zipfile.ZipFile(tmp_path / FILE) as new:
        assert {n: old.read(n) for n in old.namelist()} == {n: new.read(n) for n in new.namelist()}


def test_a_run_without_one_has_none_and_says_nothing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_representation(tmp_path) is None
    assert capsys.readouterr().err == ""


def test_damage_is_told_and_nothing_of_it_is_shown(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_representation(tmp_path, represented("abc"))
    sound = (tmp_path / FILE).read_bytes()
    generator, refused = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(sound[: generator.integers(len(sound))] if generator.random() < 0.3 else sound)
        for place in generator.integers(0, max(len(damaged), 1), 3):
            damaged[place : place + 1] = generator.bytes(1)
        (tmp_path / FILE).write_bytes(damaged)
        refused += read_representation(tmp_path) is None
    assert refused > 100  # a bit of a zip's directory that nobody reads may change
    assert capsys.readouterr().err.count(f"warning: {tmp_path / FILE} is damaged") == refused


def rewritten(run: pathlib.Path, name: str, content: bytes) -> None:
    """One array's file replaced, with a sound checksum."""
    with zipfile.ZipFile(run / FILE) as archive:
        members = {each: archive.read(each) for each in archive.namelist()} | {f"{name}.npy": content}
    with zipfile.ZipFile(run / FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, found in members.items():
            archive.writestr(each, found)


def as_npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("label_N", as_npy(np.array([{}], object))),
        ("label_N", as_npy(np.full(36, 3))),
        ("label_N", as_npy(np.zeros(36, np.int64)).replace(b"(36,)", b"(9" + b"9" * 11 + b",)")[:400]),
        ("map_MN2", as_npy(np.full((2, 36, 2), np.nan, np.float32))),
        ("similarity_QK", as_npy(np.zeros((9, 5), np.float32))),
        ("pair_P3", as_npy(np.array([[0, 7, 1]]))),
        ("confusion_CC", as_npy(np.zeros((2, 3), np.int64))),
        ("neighbour_label_QK", as_npy(np.int64(1))),
        ("pictures", as_npy(np.zeros(1000, np.uint8))),
        ("pictures_at", as_npy(np.arange(3))),
        ("about", as_npy(np.frombuffer(b"[" * 100_000, np.uint8))),
        ("about", as_npy(np.frombuffer(b'{"step": 1}', np.uint8))),
        ("memory_C", bytes(1 << 27)),
    ],
)  # fmt: skip
def test_what_cannot_be_so_is_refused(
    tmp_path: pathlib.Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    write_representation(tmp_path, represented("abc"))
    assert read_representation(tmp_path) is not None
    rewritten(tmp_path, name, content)
    assert read_representation(tmp_path) is None
    assert "is damaged and left out of the report" in capsys.readouterr().err


def test_a_file_that_is_none_hangs_nothing(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / FILE)
    assert read_representation(tmp_path) is None
    assert "not a regular file" in capsys.readouterr().err


def keep(run: pathlib.Path) -> None:
    memory, queries = features(40), features(24, seed=1)
    ranked = {"knn": queries.label_N[:, None]}
    keep_representation(run, memory, queries, numbers(40), numbers(24), ranked, PREPARATION, CPU, step=7, data="/data")


def test_a_full_disk_costs_the_pictures_and_no_evaluation(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on file size stands for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        keep(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert f"warning: {tmp_path / FILE}, which the report shows, is not written" in said
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), DataError("x")]
)
def test_memory_or_data_that_fail_cost_the_pictures_and_no_evaluation(
    tmp_path: pathlib.Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(representation, "maps", fails)
    keep(tmp_path)
    assert "is not written" in capsys.readouterr().err
