"""The benchmark of shuffles: what it counts is what the formula says, and its sets are sorted, or are not."""

import json
import pathlib

import numpy as np
import pytest

from benchmarks import record, shuffle
from fasttrain.input import open_dataset


@pytest.mark.parametrize(("batch_size", "lanes"), [(256, 16), (256, 256), (1024, 4)])
def test_an_image_has_the_company_in_a_batch_that_the_formula_says(batch_size: int, lanes: int) -> None:
    assert shuffle.company(batch_size, lanes) == shuffle.expected_company(batch_size, lanes)
    counted, expected = shuffle.company(batch_size, 0), shuffle.expected_company(batch_size, 0)
    assert abs(counted - expected) < 0.2 * expected


def test_trainings_are_on_the_same_images_in_sorted_and_in_shuffled_shards(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, set[str]] = {}

    def run(command: str, *words: object) -> str:
        if command == "train.py":
            data = pathlib.Path(str(words[words.index("--data") + 1]))
            store, old = open_dataset(data), open_dataset(shards)
            label_N = store.labels(np.arange(72))
            assert (np.diff(label_N) >= 0).all() == (data.name == "sorted")
            assert sorted(label_N) == sorted(old.labels(np.arange(72)))
            assert len(store.block_S) == 9  # type: ignore[attr-defined]
            seen.setdefault(data.name, set()).add(str(words[words.index("--shuffle") + 1]))
        return '{"knn_top1": 50.0}'

    monkeypatch.setattr(shuffle, "_run", run)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert shuffle.main(["--data", str(shards), "--shard-size", "9", "--seeds", "1"]) == 0
    assert seen == {"sorted": {"global", "block"}, "shuffled": {"block"}}
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["knn_top1"]["sorted, window 4"] == [50.0]
    assert (tmp_path / "shuffle.jsonl").exists()
    assert shuffle.main(["--data", str(tmp_path)]) == 2
