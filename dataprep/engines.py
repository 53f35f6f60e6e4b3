"""Who writes the shards: threads of this process, or a Ray cluster. Both give the same bytes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pathlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

import fasttrain
from fasttrain.dataprep.destination import Destination
from fasttrain.dataprep.encode import EncodedImage
from fasttrain.dataprep.guard import GuardedReader
from fasttrain.dataprep.plan import PlannedShard, tasks
from fasttrain.dataprep.shards import ShardRecord, Written, record_shard, write_images
from fasttrain.dataprep.sources.source import Reader
from fasttrain.formats.listing import Sample
from fasttrain.formats.manifest import FILE_NAME
from fasttrain.system.cores import usable_cores
from fasttrain.system.errors import RunError, UserError, printable
from fasttrain.system.memory import keep_freed_memory
from fasttrain.system.ordered import PATIENCE_SECONDS, stream_in_order
from fasttrain.system.watch import Watch
from fasttrain.system.workers import Workers

SKIPS_SHOWN = 20  # are named; the manifest lists all

Encode = Callable[[Reader, Sequence[tuple[Sample, bool]]], Iterable[EncodedImage | str]]


class WatchedReader:
    """A Reader whose samples a Watch knows of while they are read."""

    def __init__(self, reader: Reader, watch: Watch[str]) -> None:
        self._reader, self._watch = reader, watch

    def read(self, sample: Sample) -> bytes | np.ndarray:
        with self._watch.at(sample.path):
            return self._reader.read(sample)

    def size(self, sample: Sample) -> int:
        with self._watch.at(sample.path):
            return self._reader.size(sample)


class Note:
    """Hears of every image written or skipped; names the first skipped ones on stderr."""

    def __init__(self, advance: Callable[[int], None], quiet: bool = False) -> None:
        """Advance is called for every image: what `progress` yields. A quiet one names none."""
        self._advance = advance
        self._skipped = SKIPS_SHOWN + 1 if quiet else 0

    def __call__(self, path: str, reason: str | None) -> None:
        """Take note of one image; reason: why it is skipped, None if it is written."""
        self._advance(1)
        if reason is not None:
            self.skipped(path, reason)

    def skipped(self, path: str, reason: str) -> None:
        """Take note of what can't be used."""
        self._skipped += 1
        if self._skipped <= SKIPS_SHOWN:
            print(printable(f"skipped {path}: {reason}"), file=sys.stderr)
        elif self._skipped == SKIPS_SHOWN + 1:
            print(f"more images are skipped; {FILE_NAME} will list them all", file=sys.stderr)


class ShardWork(NamedTuple):
    """What is the same for all shards of a conversion."""

    out: Destination
    reader: Reader
    encode: Encode
    raw: bool


def on_this_machine(work: ShardWork, shards: list[PlannedShard], num_workers: int, note: Note) -> Iterator[ShardRecord]:
    """Yield the records of shards: threads encode chunks of images, this one writes them in order.

    Decoding, checking, resizing and encoding release the interpreter lock, and nothing is handed from process to
    process. While the next shard is written, a thread computes the checksum of the last; where OUT is far away, several
    take finished shards there. Memory for streams is kept and used again: mapping fresh memory costs more than reading
    a file into it.
    """
    keep_freed_memory()
    watch: Watch[str] = Watch("image", str)
    reader = GuardedReader(WatchedReader(work.reader, watch))
    portions = tasks(reader, shards, work.raw)
    images = stream_in_order(functools.partial(work.encode, reader), portions, _num_bytes, num_workers)
    recorder = Workers(work.out.shards_ahead)

    def moved(path: str, reason: str | None) -> None:
        watch.moved()
        note(path, reason)

    def record(written: Written) -> ShardRecord:
        with watch.at(written.path.name):
            return record_shard(written, work.out, watch.moved)

    with work.out.folder() as folder:
        try:
            with watch.patrol(), contextlib.closing(images):
                ahead: deque[Future[ShardRecord]] = deque()
                for planned in shards:
                    with watch.at(planned.name):
                        written = write_images(folder, planned, images, moved, reader.settle)
                    if len(ahead) == work.out.shards_ahead:
                        yield ahead.popleft().result()
                    ahead.append(recorder.submit(record, written))
                while ahead:
                    yield ahead.popleft().result()
        finally:
            recorder.close(PATIENCE_SECONDS)


def _num_bytes(image: EncodedImage | str) -> int:
    return 0 if isinstance(image, str) else len(image.stream)


def on_ray(work: ShardWork, shards: list[PlannedShard], num_workers: int, note: Note) -> Iterator[ShardRecord]:
    """Yield the records of shards, each written by one task of a Ray cluster.

    The cluster is the one that RAY_ADDRESS names ("local": a new one), or that `ray start` made on this machine, or a
    new one for the time of the call; never one that another program has for itself. Its machines see source, output
    and this checkout under the same paths; where OUT is a URL, each reaches that by itself.

    Raises:
        UserError: Ray is not installed, or OUT can't be written.
        RunError: a task failed, or Ray did.
    """
    ray = _connect(num_workers)
    try:
        at_once = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(num_cpus=1)(write_shard)
        shared = ray.put(work._replace(out=work.out.absolute()))
        waiting, running = iter(shards), dict[Any, PlannedShard]()
        while True:
            for planned in itertools.islice(waiting, at_once - len(running)):
                running[task.remote(shared, planned)] = planned
            if not running:
                return
            done, _ = ray.wait(list(running))
            record = ray.get(done[0])
            _tell(note, running.pop(done[0]), record)
            yield record
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError | UserError | RunError):
            raise error.cause from None
        raise RunError(f"a task failed: {_last_line(error.cause or error)}") from None
    except ray.exceptions.RayError as error:
        raise RunError(f"Ray: {_last_line(error)}: run the same command again") from None
    finally:
        ray.shutdown()


def write_shard(work: ShardWork, planned: PlannedShard) -> ShardRecord:
    """Write one shard and its record within this process."""
    reader = GuardedReader(work.reader)
    encode = functools.partial(work.encode, reader)
    images = itertools.chain.from_iterable(map(encode, tasks(reader, [planned], work.raw)))
    with work.out.folder() as folder:
        written = write_images(folder, planned, images, Note(lambda _: None, quiet=True), reader.settle)
        return record_shard(written, work.out)


def _connect(num_workers: int) -> Any:  # noqa: ANN401 - a module that may be missing
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install ray") from None
    path = os.pathsep.join(
        filter(None, (str(pathlib.Path(fasttrain.__file__).resolve().parents[1]), os.getenv("PYTHONPATH")))
    )
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": {"PYTHONPATH": path}},
        "log_to_driver": False,
        "logging_level": "error",
    }
    address = os.getenv("RAY_ADDRESS")
    own: dict[str, Any] = {"num_cpus": num_workers or usable_cores(), "include_dashboard": False}
    if address and address != "local":
        ray.init(**options)
        return ray
    try:
        ray.init(**own, **options)  # a new one, if none was started
    except ValueError:  # its CPUs are its own matter
        try:
            ray.init(**options)
        except ConnectionError:  # it was killed, and its address is still there
            ray.init("local", **own, **options)
    return ray


def _tell(note: Note, planned: PlannedShard, record: ShardRecord) -> None:
    reasons = {skip["path"]: skip["reason"] for skip in record.skipped}
    for sample in planned.samples:
        note(sample.path, reasons.get(sample.path))


def _last_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


ENGINES = {"local": on_this_machine, "ray": on_ray}
