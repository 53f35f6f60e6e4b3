"""Convert a folder of images to a sharded data set: python dataprep/convert.py SOURCE OUT --max-side 400

Worker processes encode small chunks of images; this process writes the shards in order, so that all cores are busy
even with one shard, and memory holds only the chunks under way. The shards are a pure function of source and
settings. Each finished shard is renamed into place and then recorded beside it, so a conversion killed at any moment
continues when the same command is run again; `manifest.json` is written last.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import PIL.features
import psutil  # type: ignore[import-untyped]

if __package__ in (None, ""):  # run as a script from a bare checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
from dataprep.beton import BetonWriter
from dataprep.images import EncodedImage, PixelSums, encode_files
from dataprep.manifest import FILE_NAME, Manifest, Shard, temporary_path, write_json
from dataprep.sources import Sample, Source, fingerprint, scan_folder, shuffled_splits
from fasttrain import __version__
from fasttrain.cli import RunError, UserError, finish, parse

STATE_FILE = "conversion.json"  # there from the first moment until manifest.json is
CHUNK_IMAGES, CHUNK_BYTES = 64, 1 << 23  # a worker's task ends at whichever comes first
SKIPS_SHOWN = 20
SECONDS_BETWEEN_LINES = 5.0
EXIT_SKIPPED = 3


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a folder of images (JPEG, PNG, WebP, BMP) to numbered shards and a manifest.

    SOURCE holds images only, or one folder per class, or train/ and val/ (or valid, validation, test) of either kind.
    The same command on an unfinished OUT continues it. Unreadable images are named, counted and left out. The last
    line on stdout is JSON. Exit status: 0 every image converted, 3 finished but some images were skipped, 2 bad
    input, 1 disk full or another failure (run again to continue), 130 interrupted.
    """

    source: pathlib.Path
    """SOURCE, the folder of images."""
    out: pathlib.Path
    """OUT, the folder to make."""
    format: Literal["ffcv"] = "ffcv"
    """Shard format: ffcv = .beton files that the stock FFCV loader reads."""
    max_side: int = 0
    """Longer side in pixels to which larger images are shrunk; 0 keeps every size. JPEGs within it are copied as is."""
    quality: int = 90
    """JPEG quality, 1 to 100, of images that are shrunk or were no JPEG."""
    shard_size: int = 4096
    """Images per shard."""
    workers: int = 0
    """Worker processes; 0 = one for each core this process may use."""
    val_fraction: float = 0.0
    """Fraction of the images, the same in every class, to set apart as the validation split of a source without one."""
    seed: int = 0
    """Seed of the order in which images are written, and of the choice of validation images."""


class PlannedShard(NamedTuple):
    """One shard to write: file name, split, and the samples in order."""

    name: str
    split: str
    samples: Sequence[Sample]


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, as recorded beside it until the manifest is written; one without samples has no file."""

    shard: Shard
    pixels: PixelSums
    skipped: list[dict[str, str]]
    class_counts: list[int]


# --- the plan: a pure function of source and settings ---


def plan_shards(splits: dict[str, list[Sample]], shard_size: int) -> list[PlannedShard]:
    """Cut each split into shards `<split>-<5 digits>.beton`."""
    return [
        PlannedShard(f"{split}-{start // shard_size:05d}.beton", split, samples[start : start + shard_size])
        for split, samples in splits.items()
        for start in range(0, len(samples), shard_size)
    ]


def settings_of(config: ConvertConfig, source: Source) -> dict[str, Any]:
    """Return what decides the content of the shards, as manifest.json records it."""
    names = ("format", "max_side", "quality", "shard_size", "val_fraction", "seed")
    return {**{name: getattr(config, name) for name in names}, "source": fingerprint(source)}


def versions() -> dict[str, str]:
    """Return the versions of the tools that decide the bytes of an encoded image."""
    libjpeg = PIL.features.version("libjpeg_turbo") or "unknown"
    return {"fasttrain": __version__, "pillow": PIL.__version__, "pillow_libjpeg_turbo": libjpeg}


# --- the workers ---


def _end_with_parent() -> None:
    # A worker waiting for tasks does not notice that the process which gives them was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


@contextlib.contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Start the pool; RunError if a worker dies."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise RunError("a worker process died (out of memory?): run the same command again to continue") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable[..., Any], *arguments: object) -> Future:
    # Workers start here and inherit the blocked signal, so that Ctrl-C reaches this process alone.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def chunks(root: pathlib.Path, samples: Sequence[Sample]) -> Iterator[list[str]]:
    """Cut samples into tasks of bounded count and bytes."""
    chunk: list[str] = []
    num_bytes = 0
    for sample in samples:
        chunk.append(sample.path)
        with contextlib.suppress(OSError):
            num_bytes += os.stat(os.path.join(root, sample.path)).st_size
        if len(chunk) == CHUNK_IMAGES or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def encode_in_order(
    config: ConvertConfig, num_workers: int, shards: list[PlannedShard]
) -> Generator[EncodedImage | str, None, None]:
    """Encode the samples of all shards with a pool of workers; results come in order, few chunks ahead."""
    with worker_pool(num_workers) as pool:
        pending: deque[Future] = deque()
        for shard in shards:
            for chunk in chunks(config.source, shard.samples):
                pending.append(_submit(pool, encode_files, config.source, chunk, config.max_side, config.quality))
                if len(pending) > 2 * num_workers + 2:
                    yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


# --- the writer ---


def write_shard(
    folder: pathlib.Path, planned: PlannedShard, images: Iterator[EncodedImage | str], num_classes: int, note: "Note"
) -> ShardRecord:
    """Write one shard from the next images of an iterator, and its record after it."""
    sums, skipped = np.zeros(7, np.int64), []
    class_counts = [0] * num_classes
    with BetonWriter(folder / planned.name, len(planned.samples)) as writer:
        # The samples come first in zip: when they end, no image of the next shard has been taken.
        for sample, image in zip(planned.samples, images, strict=False):
            if isinstance(image, str):
                skipped.append({"path": sample.path, "reason": image})
            else:
                writer.write(image.jpeg, image.height, image.width, sample.label)
                sums += (image.pixels.num_pixels, *image.pixels.total_3, *image.pixels.square_3)
                if sample.label >= 0:
                    class_counts[sample.label] += 1
            note(sample.path, image if isinstance(image, str) else None)
    pixels = PixelSums(int(sums[0]), tuple(sums[1:4].tolist()), tuple(sums[4:].tolist()))
    record = ShardRecord(_describe(folder / planned.name, writer.num_samples), pixels, skipped, class_counts)
    write_json(_record_path(folder, planned.name), asdict(record))
    return record


def _describe(path: pathlib.Path, num_samples: int) -> Shard:
    if not num_samples:
        return Shard(path.name, 0, 0, "")
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, num_samples, path.stat().st_size, sha256)


def _record_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f"{name}.json"


def read_record(folder: pathlib.Path, name: str) -> ShardRecord | None:
    """Return the record of a finished shard, None if the shard has to be written."""
    try:
        content = json.loads(_record_path(folder, name).read_bytes())
    except FileNotFoundError:
        return None
    shard = Shard(**content["shard"])
    if shard.num_samples and (not (folder / name).exists() or (folder / name).stat().st_size != shard.num_bytes):
        return None
    count, total, square = content["pixels"]
    pixels = PixelSums(count, tuple(total), tuple(square))
    return ShardRecord(shard, pixels, content["skipped"], content["class_counts"])


# --- the output folder ---


def check(config: ConvertConfig) -> None:
    """Raises UserError for values out of range and for folders that do not go together."""
    limits = {"quality": (1, 100), "max_side": (0, 65500), "shard_size": (1, 1 << 24), "workers": (0, 1024)}
    for name, (low, high) in {**limits, "seed": (0, 2**64 - 1), "val_fraction": (0, 0.99)}.items():
        if not low <= getattr(config, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {low} to {high}")
    source, out = config.source.resolve(), config.out.resolve()
    if out == source or source in out.parents:
        raise UserError(f"{config.out} lies inside the source {config.source}: name another folder")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"{config.out}: not a folder")


def finished_manifest(out: pathlib.Path, settings: dict[str, Any]) -> Manifest | None:
    """Return the manifest if this very conversion is done, None if there is none; UserError if it is another one."""
    if not (out / FILE_NAME).exists():
        return None
    manifest = Manifest.load(out)
    _check_same(out, manifest.settings, settings)
    manifest.check_shards(out)
    return manifest


def _check_same(out: pathlib.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    names = [name for name in new if old.get(name) != new[name]]
    if names:
        what = "the source has changed" if names == ["source"] else f"other settings: {', '.join(names)}"
        raise UserError(f"{out} holds a conversion that differs ({what}): remove it or name another folder")


@contextlib.contextmanager
def sole_user(out: pathlib.Path) -> Iterator[None]:
    """Keep a second conversion out of the folder; the system drops the lock with the process, however it ends."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another conversion is writing here") from None
        yield
    finally:
        os.close(descriptor)


def begin(out: pathlib.Path, settings: dict[str, Any]) -> None:
    """Record the settings in a new folder, or check that the folder's unfinished conversion has the same."""
    state = {**settings, "versions": versions()}
    path = out / STATE_FILE
    if path.exists():
        _check_same(out, _read_state(path), state)
    elif any(name != temporary_path(path).name for name in os.listdir(out)):
        raise UserError(f"{out} is not empty and holds no conversion: remove it or name another folder")
    else:
        write_json(path, state)


def _read_state(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(
            f"{path} was not written by a conversion: remove {path.parent} or name another folder"
        ) from None


def clear_state(out: pathlib.Path, plan: list[PlannedShard]) -> None:
    """Remove what only an unfinished conversion needs."""
    for planned in plan:
        _record_path(out, planned.name).unlink(missing_ok=True)
    (out / STATE_FILE).unlink(missing_ok=True)


def manifest_of(
    source: Source, plan: list[PlannedShard], records: dict[str, ShardRecord], settings: dict[str, Any]
) -> Manifest:
    """Put the records of all shards together; the pixel statistics are those of the training split."""
    by_split = {
        split: [records[p.name] for p in plan if p.split == split] for split in dict.fromkeys(p[1] for p in plan)
    }
    sums = np.array([(r.pixels[0], *r.pixels[1], *r.pixels[2]) for r in by_split["train"]], np.float64).sum(0)
    mean = sums[1:4] / sums[0] / 255
    std = np.sqrt(np.maximum(sums[4:] / sums[0] / 255**2 - mean**2, 0))
    return Manifest(
        format=settings["format"],
        classes=list(source.classes),
        splits={split: [r.shard for r in group if r.shard.num_samples] for split, group in by_split.items()},
        pixel_mean=mean.round(6).tolist(),
        pixel_std=std.round(6).tolist(),
        settings=settings,
        skipped=[skip for planned in plan for skip in records[planned.name].skipped],
        class_counts={split: np.sum([r.class_counts for r in group], 0).tolist() for split, group in by_split.items()},
        versions=versions(),
    )


# --- what a person sees ---


class Note:
    """Hears of every image written or skipped; names the first skipped ones on stderr."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance
        self._skipped = 0

    def __call__(self, path: str, reason: str | None) -> None:
        self._advance()
        if reason is None:
            return
        self._skipped += 1
        if self._skipped <= SKIPS_SHOWN:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        elif self._skipped == SKIPS_SHOWN + 1:
            print(f"more images are skipped; {FILE_NAME} will list them all", file=sys.stderr)


@contextlib.contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each image: a bar on a terminal, a line every few seconds otherwise."""
    if not sys.stderr.isatty():
        yield _plain_progress(total, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]} images/s"), TimeRemainingColumn())
    start, count = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("convert", total=total, completed=done, rate="-")

        def advance() -> None:
            nonlocal count
            count += 1
            if count % 16 == 0 or count == total - done:  # the bar is redrawn ten times a second at most anyway
                bar.update(task, completed=done + count, rate=f"{count / (time.perf_counter() - start):.0f}")

        yield advance


def _plain_progress(total: int, done: int) -> Callable[[], None]:
    start = last = time.perf_counter()
    count = 0

    def advance() -> None:
        nonlocal count, last
        count += 1
        now = time.perf_counter()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = count / (now - start)
            left = (total - done - count) / rate
            print(f"{done + count}/{total} images, {rate:.0f} images/s, {left:.0f} s left", file=sys.stderr, flush=True)

    return advance


def summary(manifest: Manifest, images_per_sec: float) -> dict[str, Any]:
    """Return the figures that the command prints as its last line."""
    shards = [shard for group in manifest.splits.values() for shard in group]
    reasons = Counter(skip["reason"] for skip in manifest.skipped)
    return {
        "images": sum(shard.num_samples for shard in shards),
        "skipped": {"count": len(manifest.skipped), "reasons": dict(sorted(reasons.items()))},
        "shards": len(shards),
        "bytes": sum(shard.num_bytes for shard in shards),
        "images_per_sec": round(images_per_sec, 1),
    }


# --- the command ---


def convert_shards(
    config: ConvertConfig, plan: list[PlannedShard], num_classes: int
) -> tuple[dict[str, ShardRecord], float]:
    """Write the shards that are missing; return the records of all by name, and the images per second of this run."""
    found = {planned.name: read_record(config.out, planned.name) for planned in plan}
    records = {name: record for name, record in found.items() if record is not None}
    missing = [planned for planned in plan if planned.name not in records]
    total, left = (sum(len(planned.samples) for planned in shards) for shards in (plan, missing))
    num_workers = config.workers or len(psutil.Process().cpu_affinity())
    start = time.perf_counter()
    images = encode_in_order(config, num_workers, missing)
    with contextlib.closing(images), progress(total, total - left) as advance:
        note = Note(advance)
        for planned in missing:
            records[planned.name] = write_shard(config.out, planned, images, num_classes, note)
    return records, left / (time.perf_counter() - start)


def convert(config: ConvertConfig) -> tuple[Manifest, float]:
    """Convert, or continue; return the manifest and the images per second of this run (0 if all was done before).

    Raises:
        UserError, DataError: bad input.
        RunError: disk full, or a worker died; finished shards are kept.
    """
    check(config)
    source = scan_folder(config.source)
    settings = settings_of(config, source)
    plan = plan_shards(shuffled_splits(source, config.val_fraction, config.seed), config.shard_size)
    config.out.mkdir(parents=True, exist_ok=True)
    with sole_user(config.out):
        manifest = finished_manifest(config.out, settings)
        if manifest is not None:
            clear_state(config.out, plan)
            print(f"{config.out} is already converted with these settings")
            return manifest, 0.0
        begin(config.out, settings)
        try:
            records, images_per_sec = convert_shards(config, plan, len(source.classes))
            return complete(config.out, source, plan, records, settings), images_per_sec
        except OSError as error:
            reason = f"{error.strerror or error}: finished shards are kept, run the same command again to continue"
            raise RunError(f"{error.filename or config.out}: {reason}") from None


def complete(
    out: pathlib.Path,
    source: Source,
    plan: list[PlannedShard],
    records: dict[str, ShardRecord],
    settings: dict[str, Any],
) -> Manifest:
    """Write the manifest and remove the records; UserError if no image of a split could be read."""
    for split in source.splits:
        group = [records[planned.name] for planned in plan if planned.split == split]
        if not any(record.shard.num_samples for record in group):
            clear_state(out, plan)
            first = group[0].skipped[0]
            raise UserError(
                f"no image of the {split} split can be read; the first is {first['path']}: {first['reason']}"
            )
    manifest = manifest_of(source, plan, records, settings)
    manifest.save(out)
    clear_state(out, plan)
    return manifest


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ConvertConfig for what it prints and returns."""
    import tyro

    config = parse(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(ConvertConfig), argv)
    manifest, images_per_sec = convert(config)
    print(json.dumps(summary(manifest, images_per_sec)))
    return EXIT_SKIPPED if manifest.skipped else 0


if __name__ == "__main__":
    raise SystemExit(finish(main))
