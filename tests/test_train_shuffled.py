"""Training on shards that are mixed some at a time: exact resume, ranks, what "auto" chooses, and what is refused."""

import json
import os
import pathlib
from collections.abc import Iterator

import pytest
from support.commands import one_line
from support.forks import RunCommand, finished, on_ranks, succeed
from support.launch import TINY, equal, final_state, train

from fasttrain.input import Batch, Order, ThreadLoader, open_dataset
from fasttrain.train import main

BLOCK = ["--shuffle", "block", "--shuffle-window", "2"]


def train_telling(folder: pathlib.Path, words: list[str]) -> int:
    """Train, and write the samples of each batch of this rank down: for a process of its own."""
    epoch = ThreadLoader.epoch

    def told(loader: ThreadLoader, n: int) -> Iterator[Batch]:
        with open(folder / f"rank-{os.environ.get('RANK', 0)}", "a", encoding="ascii") as file:
            for batch in epoch(loader, n):
                print(json.dumps([n, batch.index_B.tolist()]), file=file, flush=True)
                yield batch

    ThreadLoader.epoch = told  # type: ignore[method-assign]
    return main(words)


def told(folder: pathlib.Path, rank: int, steps: int) -> list:
    return [json.loads(line) for line in (folder / f"rank-{rank}").read_text().splitlines()][:steps]


def test_a_run_by_blocks_resumes_inside_an_epoch_to_the_bit(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(shards, whole, *BLOCK) == 0
    for more in (["--max-steps", 3], ["--max-steps", 10], []):
        assert train(shards, run, *BLOCK, *more) == 0
    state = final_state(run)
    assert (state["step"], state["loader"]["lanes"]) == (16, 2)
    assert equal(final_state(whole), state) == []
    assert train(shards, tmp_path / "global", "--shuffle", "global") == 0
    assert equal(final_state(tmp_path / "global"), state)


def test_ranks_share_the_samples_that_one_process_sees(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    steps, words = 6, ["--data", str(shards), *TINY, *BLOCK, "--max-steps", "6"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one = finished(tmp_path, train_telling, tmp_path / "one", [*words, "--run", str(tmp_path / "one" / "run")])
    two = on_ranks(tmp_path, 2, train_telling, tmp_path / "two", [*words, "--run", str(tmp_path / "two" / "run")])
    succeed([one, *two])
    alone = told(tmp_path / "one", 0, steps)
    shares = [told(tmp_path / "two", rank, steps) for rank in range(2)]
    assert [n for n, _ in alone] == [0] * 4 + [1] * 2
    assert [index for _, index in alone] == [first + second for (_, first), (_, second) in zip(*shares, strict=True)]
    store = open_dataset(shards)
    order = Order(72, 16, lanes=2, block_S=store.block_S)  # type: ignore[attr-defined]
    assert alone[5][1] == order.step(1, 1).tolist()


def test_plain_image_files_are_not_in_shards(
    image_folder: pathlib.Path, tmp_path: pathlib.Path, run_command: RunCommand
) -> None:
    process = run_command("fasttrain/train.py", "--data", image_folder, "--run", "run", *TINY, *BLOCK)
    assert process.returncode == 2
    assert f"--shuffle block is for shards, and {image_folder} has none: convert it first" in one_line(process)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("patched", "value", "why"),
    [
        ("network_file_system", lambda path: "nfs4", "is on a file system of the network (nfs4)"),
        ("machine_memory", lambda: 1000, "the shards have 0 GiB, the machine 0 GiB of memory"),
    ],
)
def test_what_auto_chooses_is_said_and_a_run_keeps_it(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    patched: str, value: object, why: str,
) -> None:  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(shards, tmp_path / "global", "--max-steps", 1) == 0
    assert "--shuffle" not in capfd.readouterr().err
    with monkeypatch.context() as there:
        there.setattr(f"fasttrain.input.shuffle.{patched}", value)
        assert train(shards, whole, "--max-steps", 6) == 0
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "--shuffle" in line]
        assert "--shuffle block, 3 shards at once: " in line
        assert why in line
        assert train(shards, run, "--max-steps", 2) == 0
        capfd.readouterr()
    assert train(shards, run, "--max-steps", 6) == 0  # where it would be global now
    assert "--shuffle" not in capfd.readouterr().err
    assert final_state(run)["loader"]["lanes"] == 3
    assert equal(final_state(whole), final_state(run)) == []
    assert final_state(tmp_path / "global")["loader"]["lanes"] == 0


def test_another_shuffle_of_the_same_run_is_refused(
    shards: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, tmp_path / "run", *BLOCK, "--max-steps", 1) == 0
    assert train(shards, tmp_path / "run", "--shuffle", "global", "--max-steps", 2) == 2
    assert "--shuffle was 'block', now 'global'" in capfd.readouterr().err
