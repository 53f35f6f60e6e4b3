"""The local engine: what hangs in it holds nobody up."""

import functools
import itertools
import threading
from pathlib import Path

import pytest
from support.pictures import make_images

from fasttrain.dataprep import engines
from fasttrain.dataprep.destination import LocalFolder
from fasttrain.dataprep.encode import Encoding, encode_samples
from fasttrain.dataprep.engines import ShardWork, on_this_machine
from fasttrain.dataprep.plan import plan_shards
from fasttrain.dataprep.sources.folder import scan_folder


def test_ctrl_c_does_not_wait_for_a_checksum_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, release, ended = threading.Event(), threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        started.set()
        release.wait(60)
        ended.set()

    def interrupted() -> None:
        if next(number) == 4:  # of the second shard, so that the first one's checksum is under way
            assert started.wait(60)
            raise KeyboardInterrupt

    number = itertools.count(1)
    monkeypatch.setattr(engines, "record_shard", hang)
    monkeypatch.setattr(engines, "PATIENCE_SECONDS", 0.0)
    source = scan_folder(make_images(tmp_path / "source", 1, 6))
    encode = functools.partial(encode_samples, encoding=Encoding())
    work = ShardWork(LocalFolder(tmp_path), source.reader, encode, False)
    with pytest.raises(KeyboardInterrupt):
        list(on_this_machine(work, plan_shards(source.splits, 3, "ffcv"), 1, engines.Note(lambda _: interrupted())))
    assert not ended.is_set()
    release.set()
