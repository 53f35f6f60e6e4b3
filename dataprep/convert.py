#!/usr/bin/env python3
"""Convert images in any of many forms to a sharded data set.

    python dataprep/convert.py SOURCE OUT --max-side 400

Threads encode small chunks of images; the main one writes the shards in order, so that all cores are busy even with
one shard, and memory holds only the listing and the chunks under way. The shards are a pure function of the source and
the settings. Each finished shard is renamed into place and then recorded beside it, so a conversion killed
at any moment continues when the same command is run again; `manifest.json` is written last.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import PIL
import PIL.features

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain import __version__
from fasttrain.dataprep.destination import Destination, destination_of
from fasttrain.dataprep.download import begin_copy, copied, copy_folder, list_source, remove_copy
from fasttrain.dataprep.encode import MAX_SIDE, Check, Encoding, Write, encode_samples
from fasttrain.dataprep.engines import ENGINES, Note, ShardWork
from fasttrain.dataprep.order import ORDER_VERSION, Shuffle, chosen_shuffle, shuffled_splits
from fasttrain.dataprep.parts import Part
from fasttrain.dataprep.plan import PlannedShard, by_split, plan_shards
from fasttrain.dataprep.shards import read_records, record_name
from fasttrain.dataprep.sources.kinds import Kind, fingerprints, open_source
from fasttrain.dataprep.sources.source import Source
from fasttrain.dataprep.state import begin, clear_state, finished_manifest
from fasttrain.dataprep.totals import Totals
from fasttrain.formats.manifest import SKIPPED_FILE, STATE_FILE, Manifest
from fasttrain.storage.attempts import without_secrets
from fasttrain.storage.remote import is_remote, local_path
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import EXIT_SKIPPED, DataError, RunError, UserError, note
from fasttrain.system.options import Bounds, Options
from fasttrain.system.progress import progress


@dataclass(frozen=True)
class ConvertConfig(Options):
    """Convert images (JPEG, PNG, WebP, BMP, GIF, TIFF, pixels) to numbered shards and a manifest.

    SOURCE is a folder of images only, or of one folder per class, or of train/ and val/ (or valid, validation, dev,
    eval, test, in any spelling) of either kind; a .tar or .zip of such a folder, or a folder of one .tar per class;
    WebDataset .tar files (one, a folder, or a quoted pattern like 'set-{000..012}.tar'); parquet files with a column of
    images; a folder of CIFAR-10 or CIFAR-100 batches; an .npz; FFCV's .beton files. Archives are read in place: nothing
    is unpacked, no link is followed. Any of these may be far away (hf://datasets/OWNER/NAME, s3://, gs://, https://):
    it is copied to OUT.source for the time of the conversion. So may OUT: shards are made here and go there one by one.
    The same command on an unfinished OUT continues it. Unreadable images are named, counted and left out; what is no
    image, or of another split, is counted, too. The last line on stdout is JSON. Exit status: 0 every image converted,
    or 3 finished but some images were skipped, 2 bad input, 1 disk full or another failure (run again to continue),
    or 130 interrupted.
    """

    source: str
    """SOURCE, the images: a path, or a URL of any protocol that fsspec knows."""
    out: str
    """OUT, the folder to make: a path, or a URL of any protocol that fsspec can write."""
    kind: Kind = "auto"
    """What SOURCE is; auto = recognised by what is there. tar, of a folder: each .tar in it is a class, or a split."""
    labels: str = "auto"
    """auto = where they are customary, and none where they are no classes; none = they are not read; or their NAME: a
    column, a member's extension or a key of its .json, an array. It is an error if that holds no classes."""
    format: Literal["ffcv", "webdataset"] = "ffcv"
    """Shard format: ffcv = .beton files that the stock FFCV loader reads; webdataset = .tar files with DALI's index."""
    write: Write = "auto"
    """What is stored: auto = the exact pixels of lossless images up to 96 px (in a .tar as PNG), else JPEG; jpeg; for a
    .beton file also raw = RGB pixels; smart = pixels where they take at most 3 times the JPEG."""
    max_side: Annotated[int, Bounds(0, MAX_SIDE)] = 0
    """Longer side in pixels to which larger images are shrunk; 0 keeps every size. JPEGs within it are copied as is."""
    quality: Annotated[int, Bounds(1, 100)] = 90
    """JPEG quality, 1 to 100, of images that are shrunk or were no JPEG; above 95, those that were lossless keep their
    colours at full size."""
    check: Check = "decode"
    """How damage is found in JPEGs that are copied: decode = by decoding them at 1/8, and they are left out; none = it
    is not: training, or verify.py --deep, meets it. Others are decoded anyway, as are those measured for statistics."""
    shard_size: Annotated[int, Bounds(1, 1 << 24)] = 2048
    """Images per shard."""
    workers: Annotated[int | Literal["auto"], Bounds(1)] = "auto"
    """Threads, with ray shards at a time; auto = one for each core this process, or the cluster, may use."""
    engine: Literal["local", "ray"] = "local"
    """Where the work is done; ray = on a Ray cluster, whose machines see SOURCE and OUT under the same paths (an
    OUT that is a URL needs no such place)."""
    part: str | None = None
    """I/N = write only the I-th of N equal parts of the shards, 1/N to N/N, into the same OUT, from as many machines
    and in as many jobs as is convenient: all with the same options. The one that finds all shards there writes the
    manifest; the last line of the others says how many are missing ("shards_missing")."""
    val_fraction: Annotated[float, Bounds(0, 0.99)] = 0.0
    """Fraction of each class, rounded to whole images, to set apart as the validation split of a source without one."""
    shuffle: Shuffle = "auto"
    """global = each shard holds images from all over SOURCE; block = the files of SOURCE are read in sequence, 64 at a
    time, which disks and networks like better; auto = block for 64 or more .tar (or .beton) files of over 256 GiB.
    Rows of tables are always shuffled among neighbouring row groups."""
    seed: Annotated[int, Bounds(0, 2**64 - 1)] = 0
    """Seed of the order in which images are written, and of the choice of validation images."""


def check(config: ConvertConfig) -> None:
    """Raises UserError for options and for folders that do not go together."""
    if not (config.source and config.out):  # of a variable that is not set, perhaps; else the current folder
        raise UserError("SOURCE and OUT: one is empty")
    if config.format == "webdataset" and config.write in ("raw", "smart"):
        raise UserError(f"--write {config.write} is for --format ffcv: a .tar shard holds files of images")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", config.out):  # of a URL that went through a program for paths
        raise UserError(f"{config.out}: a URL has // behind its colon; a folder of that name is ./{config.out}")
    # Path.resolve() raises an error of its own where a link leads to itself.
    paths = [local_path(place) for place in (config.source, config.out)]
    source, out = (pathlib.Path(path if is_remote(path) else os.path.realpath(path)) for path in paths)
    if out == source or source in out.parents:
        shown = map(without_secrets, (config.out, config.source))
        raise UserError("{} lies inside the source {}: name another folder".format(*shown))
    if not is_remote(paths[1]) and out.exists() and not out.is_dir():
        raise UserError(f"{config.out}: not a folder")


def settings_of(config: ConvertConfig, source: str, shuffle: Shuffle) -> dict[str, Any]:
    """Return what decides the content of the shards, as manifest.json records it; source: its fingerprint.

    A global shuffle is None, and is not recorded: sets that were converted before one could choose have it. What
    "auto" will be follows from the source, so that nothing is said of it.
    """
    names = ("format", "write", "max_side", "quality", "check", "shard_size", "val_fraction", "seed")
    chosen = {} if shuffle == "auto" else {"shuffle": "block" if shuffle == "block" else None}
    return {**{name: getattr(config, name) for name in names}, "source": source, **chosen}


def settings_from_afar(config: ConvertConfig, digest: str, shuffle: Shuffle) -> dict[str, Any]:
    """Return the settings for a URL. Its digest says nothing of how files are read, so they say it, too.

    "auto" is None, and is not recorded: sets that were converted before this was told have it.
    """
    names = ("kind", "labels")
    read = {name: None if getattr(config, name) == "auto" else getattr(config, name) for name in names}
    return {**settings_of(config, digest, shuffle), **read}


def state_of(settings: dict[str, Any], source: str, shuffle: Shuffle) -> dict[str, Any]:
    """Return what must not change until the last shard is written; source: its fingerprint with times."""
    return {**settings, "source": source, "versions": versions(), "shuffle": shuffle, "order": ORDER_VERSION}


def versions() -> dict[str, str]:
    """Return the versions of the tools that decide the bytes of an encoded image."""
    libjpeg = PIL.features.version("libjpeg_turbo") or "unknown"
    zlib = PIL.features.version("zlib") or "unknown"
    return {"fasttrain": __version__, "pillow": PIL.__version__, "pillow_libjpeg_turbo": libjpeg, "pillow_zlib": zlib}


def convert_shards(
    config: ConvertConfig, out: Destination, source: Source, plan: list[PlannedShard]
) -> tuple[Totals, float]:
    """Write the shards that are missing; return what all come to, and the images per second of this run."""
    totals = Totals(source)
    for record in read_records(out, plan, len(source.classes)):
        totals.add(record)
    missing = [planned for planned in plan if planned.name not in totals.shards]
    total, left = (sum(len(planned.samples) for planned in shards) for shards in (plan, missing))
    raw = config.write in ("raw", "smart")
    png = config.format == "webdataset"
    encoding = Encoding(config.max_side, config.quality, config.write, config.check, png)
    encode = functools.partial(encode_samples, encoding=encoding)
    work = ShardWork(out, source.reader, encode, raw)
    start = time.perf_counter()
    with progress(total, total - left) as advance:
        num_workers = 0 if config.workers == "auto" else config.workers
        told = Note(advance)
        for skip in source.skipped:
            told.skipped(**skip)
        for record in ENGINES[config.engine](work, missing, num_workers, told):
            totals.add(record)
    return totals, left / (time.perf_counter() - start)


def complete(out: Destination, plan: list[PlannedShard], totals: Totals, settings: dict[str, Any]) -> Manifest:
    """Write the manifest and remove the records; UserError if no image of a split could be read."""
    for split, names in by_split(plan).items():
        if not any(totals.shards[name].num_samples for name in names):
            clear_state(out)
            path, reason = totals.first_skip(names)
            raise UserError(f"no image of the {split} split can be read; the first is {path}: {reason}")
    with out.folder() as folder:
        manifest = totals.manifest(plan, settings, versions(), folder)
        if manifest.skips:
            out.publish([folder / SKIPPED_FILE])
    out.write_manifest(manifest)
    clear_state(out)
    return manifest


def tell(source: Source) -> None:
    """Say on stderr how the source was read, and what of it is not used."""
    for sentence in (*source.notes, *([str(source.unused)] if source.unused.count else [])):
        note(sentence)


def convert(config: ConvertConfig) -> tuple[Manifest, float]:
    """Convert, or continue; return the manifest and the images per second of this run (0 if all was done before).

    Raises:
        UserError, DataError: bad input.
        RunError: disk full, or a worker died; finished shards are kept.
    """
    check(config)
    if is_remote(config.source):
        return convert_remote(config)
    out = destination_of(config.out)
    opened = Opened.of(config)
    out.make()
    with out.lock():
        if manifest := finished(out, opened.settings):
            return manifest, 0.0
        begin(out, opened.state)
        return write(config, out, opened.source, opened.plan, opened.settings)


class Opened(NamedTuple):
    """A source on this machine, listed, and what is to be made of it."""

    source: Source
    plan: list[PlannedShard]
    settings: dict[str, Any]
    state: dict[str, Any]

    @classmethod
    def of(cls, config: ConvertConfig) -> Opened:
        """List the source of a conversion, and say what of it is not used. Raises as convert."""
        source = open_source(pathlib.Path(config.source), config.kind, config.labels)
        tell(source)
        shuffle = chosen_shuffle(source, config.shuffle)
        # Until the last shard is written, an image must not even have been replaced by another of the same size.
        plain, with_times = fingerprints(source)
        settings = settings_of(config, plain, shuffle)
        return cls(source, planned(config, source, shuffle), settings, state_of(settings, with_times, shuffle))


def convert_part(config: ConvertConfig, part: Part) -> tuple[Manifest, float, int]:
    """Convert, or continue, a part of the shards.

    Returns what all parts come to, or, where some shards are still missing, this one; the images per second of this
    run; and how many are missing. Raises as convert.
    """
    check(config)
    if is_remote(config.source):
        raise UserError("--part: each part would download SOURCE: copy it first, to storage that all of them see")
    out = destination_of(config.out)
    opened = Opened.of(config)
    out.make()
    with out.lock_part(part):
        with out.moment():
            if manifest := finished(out, opened.settings):
                return manifest, 0.0, 0
            begin(out, opened.state)
        share = part.share(opened.plan)
        with failing(out):
            totals, images_per_sec = convert_shards(config, out, opened.source, share)
            with out.moment():
                manifest, num_missing = end_part(out, opened, share, totals)
    return manifest, images_per_sec, num_missing


def end_part(out: Destination, opened: Opened, share: list[PlannedShard], totals: Totals) -> tuple[Manifest, int]:
    """Complete the set if all shards are there; return its manifest, or that of a share, and how many are missing."""
    there = set(out.names())
    num_missing = sum(record_name(planned.name) not in there for planned in opened.plan)
    if not num_missing:
        rest = [planned for planned in opened.plan if planned.name not in totals.shards]
        for record in read_records(out, rest, len(opened.source.classes)):
            totals.add(record)
        num_missing = len(opened.plan) - len(totals.shards)  # damaged ones
    # Looked for only now: another part that has come to the end writes the manifest, and then removes the records.
    if manifest := finished_manifest(out, opened.settings):
        clear_state(out)
        return manifest, 0
    if not num_missing:
        return complete(out, opened.plan, totals, opened.settings), 0
    return totals.manifest(share, opened.settings, versions(), None), num_missing


def convert_remote(config: ConvertConfig) -> tuple[Manifest, float]:
    """Convert a source that is far away: by a copy beside OUT, which is removed once all is done."""
    out = destination_of(config.out)
    remote = list_source(config.source, out.beside)
    settings = settings_from_afar(config, remote.digest(), config.shuffle)
    out.make()
    with out.lock():
        if manifest := finished(out, settings):
            remove_copy(out.beside)
            return manifest, 0.0
        begin(out, state_of(settings, remote.digest(times=True), config.shuffle))
        begin_copy(config.source, remote, out.beside)
        with out.lock_copy(copy_folder(out.beside)):
            path = copied(remote, out.beside)
            try:
                source = open_source(path, config.kind, config.labels)
                shuffle = chosen_shuffle(source, config.shuffle)
                plan = planned(config, source, shuffle)
            except (UserError, DataError) as error:
                if set(out.names()) == {STATE_FILE}:  # other options may do, with the same copy
                    clear_state(out)
                raise UserError(str(error).replace(str(path), without_secrets(remote.url))) from error
            source.notes.insert(0, f"read from {without_secrets(remote.url)}")
            tell(source)
            settings = settings_from_afar(config, remote.digest(), shuffle)
            manifest, images_per_sec = write(config, out, source, plan, settings)
            remove_copy(out.beside)
            return manifest, images_per_sec


def planned(config: ConvertConfig, source: Source, shuffle: Literal["global", "block"]) -> list[PlannedShard]:
    """Return the shards to write, in order."""
    splits = shuffled_splits(source, config.val_fraction, config.seed, shuffle == "block")
    return plan_shards(splits, config.shard_size, config.format)


def finished(out: Destination, settings: dict[str, Any]) -> Manifest | None:
    """Return the manifest if all was done before, and say so; None if not. UserError for other settings."""
    manifest = finished_manifest(out, settings)
    if manifest is not None:
        clear_state(out)
        print(f"{out} is already converted with these settings")
    return manifest


def write(
    config: ConvertConfig, out: Destination, source: Source, plan: list[PlannedShard], settings: dict[str, Any]
) -> tuple[Manifest, float]:
    """Write what is missing, and the manifest; return it and the images per second. Raises as convert."""
    with failing(out):
        totals, images_per_sec = convert_shards(config, out, source, plan)
        return complete(out, plan, totals, settings), images_per_sec


@contextlib.contextmanager
def failing(out: Destination) -> Iterator[None]:
    """Make a RunError of an error of a disk, and of full memory, which says how to go on."""
    try:
        yield
    except MemoryError:
        raise RunError(
            "out of memory: finished shards are kept, run the same command again to continue; fewer --workers take less"
        ) from None
    except OSError as error:
        reason = f"{error.strerror or error}: finished shards are kept, run the same command again to continue"
        raise RunError(f"{error.filename or out}: {reason}") from None


def summary(manifest: Manifest, images_per_sec: float) -> dict[str, Any]:
    """Return the figures that the command prints as its last line."""
    shards = [shard for group in manifest.splits.values() for shard in group]
    reasons = manifest.skips.reasons if manifest.skips else Counter(skip["reason"] for skip in manifest.skipped)
    unused = {found["reason"]: found["count"] for found in manifest.unused}
    return {
        "images": sum(shard.num_samples for shard in shards),
        "skipped": {"count": sum(reasons.values()), "reasons": dict(sorted(reasons.items()))},
        "unused": {"count": sum(unused.values()), "reasons": unused},
        "notes": manifest.notes,
        "classes": len(manifest.classes),
        "shards": len(shards),
        "bytes": sum(file.num_bytes for shard in shards for file in shard.files()),
        "images_per_sec": round(images_per_sec, 1),
    }


def convert_command(config: ConvertConfig) -> int:
    """Convert and print the summary; returns the exit status."""
    if config.part is not None:
        manifest, images_per_sec, num_missing = convert_part(config, Part.parse(config.part))
        part = {"part": config.part, "shards_missing": num_missing}
    else:
        (manifest, images_per_sec), num_missing, part = convert(config), 0, {}
    print(json.dumps({**summary(manifest, images_per_sec), **part}), flush=True)
    return EXIT_SKIPPED if manifest.skipped and not num_missing else 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: convert_command(parse(ConvertConfig, argv, positional=True)))


if __name__ == "__main__":
    raise SystemExit(main())
