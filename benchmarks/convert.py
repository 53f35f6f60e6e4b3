#!/usr/bin/env python3
"""Compare conversion with FFCV's DatasetWriter on the same image folder.

    python benchmarks/convert.py --data photos

Four sides, alternately, in rounds, with the same number of workers (our threads, FFCV's processes): ours copying JPEGs
through, the same without looking for damage (--check none), ours shrinking to --max-side and re-encoding, and FFCV
1.0.2 doing what its users do (PIL decode, RGBImageField(write_mode="jpg", max_resolution=--max-side, jpeg_quality=90)).
Times run from the call to the finished set, with the folder's listing, the start of workers and, of ours, checksums and
manifest; imports are left out, and the compiling of numba code, which is kept on disk.

Prints a table and appends a line to benchmarks/results/convert.jsonl; the last line is JSON: median ratios within
rounds. The folder should hold some thousand photographs: in fewer, start-up, statistics and the last checksum take a
part that they don't have in a whole data set.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from PIL import Image

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from benchmarks import record
from fasttrain.dataprep.convert import ConvertConfig, convert
from fasttrain.dataprep.encode import MAX_SIDE, Check
from fasttrain.dataprep.sources.folder import scan_folder
from fasttrain.formats.listing import Listing
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import UserError
from fasttrain.system.options import Bounds, Options, Positive

PASS_THROUGH, UNCHECKED, REENCODE, FFCV = "pass-through", "unchecked", "re-encode", "ffcv"


@dataclass(frozen=True)
class ConvertBenchmark(Options):
    """Compare conversion with FFCV's DatasetWriter: images per second, and median ratios within rounds."""

    data: pathlib.Path
    """Folder of images, a folder per class or flat."""
    rounds: Positive[int] = 5
    """Rounds; every side runs once in each, in turn."""
    max_side: Annotated[int, Bounds(0, MAX_SIDE)] = 400
    """Longer side to which the re-encoding sides shrink."""
    workers: Annotated[int | Literal["auto"], Bounds(1)] = "auto"
    """Workers of every side; auto = one for each core this process may use."""


class Photos:
    """The images of a listing as FFCV's writer wants them: (PIL image, label)."""

    def __init__(self, root: pathlib.Path, samples: Listing) -> None:
        self._root, self._samples = root, samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        sample = self._samples[index]
        return Image.open(self._root / sample.path).convert("RGB"), sample.label


def convert_ours(config: ConvertBenchmark, workers: int, max_side: int, check: Check, out: pathlib.Path) -> float:
    """Convert with this project; return images per second."""
    start = time.perf_counter()
    manifest, _ = convert(ConvertConfig(str(config.data), str(out), max_side=max_side, check=check, workers=workers))
    return sum(map(manifest.num_samples, manifest.splits)) / (time.perf_counter() - start)


def convert_ffcv(config: ConvertBenchmark, workers: int, out: pathlib.Path) -> float:
    """Convert with FFCV's writer; return images per second."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    start = time.perf_counter()
    source = scan_folder(config.data)
    out.mkdir()
    image = RGBImageField(write_mode="jpg", max_resolution=config.max_side, jpeg_quality=90)
    writer = DatasetWriter(str(out / "all.beton"), {"image": image, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(Photos(source.root, source.splits["train"]), chunksize=32, shuffle_indices=True)
    return len(source.splits["train"]) / (time.perf_counter() - start)


def measure(config: ConvertBenchmark) -> dict[str, list[float]]:
    """Return the images per second of every side, by round. One unmeasured pass first fills the page cache."""
    workers = len(os.sched_getaffinity(0)) if config.workers == "auto" else config.workers
    sides: dict[str, Callable[[pathlib.Path], float]] = {
        PASS_THROUGH: functools.partial(convert_ours, config, workers, 0, "decode"),
        UNCHECKED: functools.partial(convert_ours, config, workers, 0, "none"),
        REENCODE: functools.partial(convert_ours, config, workers, config.max_side, "decode"),
        FFCV: functools.partial(convert_ffcv, config, workers),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(config.rounds + 1):
        for side, run in sides.items():
            if turn == 0 and side == FFCV:
                continue
            with tempfile.TemporaryDirectory() as folder:
                rate = run(pathlib.Path(folder) / "out")
            if turn:
                rates[side].append(rate)
                print(f"round {turn}: {side} {rate:.0f} images/s", file=sys.stderr, flush=True)
    return rates


def ratio(rates: dict[str, list[float]], side: str) -> float:
    """Return the median of a side's rate over FFCV's, taken round by round."""
    return round(statistics.median(a / b for a, b in zip(rates[side], rates[FFCV], strict=True)), 2)


def table(rates: dict[str, list[float]]) -> str:
    """Return the medians, extremes and ratios as text."""
    lines = [f"{'side':<14}{'images/s':>10}{'min':>8}{'max':>8}{'x FFCV':>9}"]
    for side, values in rates.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        lines.append(f"{side:<14}{middle:>10.0f}{low:>8.0f}{high:>8.0f}{ratio(rates, side):>9.2f}")
    return "\n".join(lines)


def bench_command(config: ConvertBenchmark) -> int:
    """Measure, print and record; returns the exit status."""
    if importlib.util.find_spec("ffcv") is None:
        raise UserError("the comparison needs FFCV: pip install -e .[ffcv]")
    rates = measure(config)
    print(table(rates))
    names = {PASS_THROUGH: "passthrough", UNCHECKED: "passthrough_unchecked", REENCODE: "reencode"}
    result = {f"{name}_vs_ffcv": ratio(rates, side) for side, name in names.items()}
    images = len(scan_folder(config.data).splits["train"])
    print(json.dumps(result), flush=True)
    record.append("convert", {"images": images, "max_side": config.max_side, "rates": rates, **result})
    return 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: bench_command(parse(ConvertBenchmark, argv)))


if __name__ == "__main__":
    raise SystemExit(main())
