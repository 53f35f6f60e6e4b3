"""Features of images by a run's encoder, in the images' order, in a file that other programs read."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.engine.precision import slow
from fasttrain.engine.ranks import Ranks
from fasttrain.evaluation.features import central_views, full_precision
from fasttrain.formats.embedding import Row, check_out, finished, write
from fasttrain.input import Batch, Order, Place, Store, located, open_dataset, split_names
from fasttrain.input.blanks import Blanks
from fasttrain.jobs.options import EmbedConfig
from fasttrain.jobs.unfinished import Unfinished, clear
from fasttrain.networks.layer import Layer
from fasttrain.run.folder import environment
from fasttrain.system.cli import warn
from fasttrain.system.durable import reason
from fasttrain.system.errors import EXIT_SKIPPED, EXIT_USER_ERROR, DataError, RunError, UserError, note
from fasttrain.system.progress import progress
from fasttrain.trained import Trained, load_trained
from fasttrain.weights.preprocessing import Preprocessing

NAMED_FAILURES = 20  # are printed; all are in the file
LOST = 10  # images of one batch, that is all of it, which the system can't read: storage is gone


class Work(NamedTuple):
    """What makes a batch's features."""

    network: nn.Module
    preprocessing: Preprocessing
    device: torch.device
    workers: int
    options: EmbedConfig


def embed(options: EmbedConfig) -> int:
    """Write the features of all images that can be read; returns the exit status."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ.get("RANK", "0") == "0":
            raise UserError("features are computed by one process: start it without torchrun, or one for each --split")
        return EXIT_USER_ERROR
    out = pathlib.Path(options.out)
    check_out(out)
    checkpoint = pathlib.Path(options.checkpoint) if options.checkpoint else None
    trained = load_trained(pathlib.Path(options.run), options.best, checkpoint, options.method, arch=options.arch)
    images = located(options.images, options.elsewhere.after(trained.config.data.elsewhere))
    ranks = Ranks(options.device)
    stores = open_splits(images, options.split, trained.preprocessing.size)
    network, width = network_of(trained, options.layer)
    settings = settings_of(options, trained, stores, ranks.device)

    about, images_per_sec = finished(out, settings), 0.0
    if about:
        note(f"{out} is already there, with these features")
    else:
        if line := slow(options.precision, ranks.device):
            note(line)
        note(", ".join(f"{store.num_samples:,} images of {split}" for split, store in stores.items()))
        paths = {"run": os.path.realpath(options.run), "data": images.real}
        with Unfinished(out, settings, {**paths, "environment": environment()}, width) as unfinished:
            work = Work(network, trained.preprocessing, ranks.device, ranks.threads(options.workers), options)
            about, images_per_sec = complete(out, work, stores, unfinished)
    clear(out)
    if about["not_finite"]:
        warn(f"{about['not_finite']} of {about['images']} images have features that are no numbers")
    figures = {name: about[name] for name in ("step", "images", "width")}
    figures |= {"failed": len(about["failed"]), "images_per_sec": round(images_per_sec, 1), "out": str(out)}
    print(json.dumps(figures), flush=True)
    ranks.close()
    return EXIT_SKIPPED if about["failed"] else 0


def open_splits(images: Place, split: str, size: int) -> dict[str, Blanks]:
    """The images of a split, or of all there are, for views of a size. Raises UserError and DataError."""
    splits = split_names(images)
    if split not in ("all", *splits):
        raise UserError(f"{images} has no {split!r} split; it has: {', '.join(splits)}")
    chosen = splits if split == "all" else (split,)
    return {each: Blanks(open_dataset(images, each, view_size=size)) for each in chosen}


def complete(
    out: pathlib.Path, work: Work, stores: dict[str, Blanks], unfinished: Unfinished
) -> tuple[dict[str, Any], float]:
    """Do what is left; returns what the file tells of itself, and images per second. Raises DataError and RunError."""
    try:
        images_per_sec = extract(work, stores, unfinished)
        about = unfinished.complete()
        if not about["images"]:
            clear(out)
            first = about["failed"][0]
            raise DataError(f"no image can be read; the first is {first['name']}: {first['reason']}")
        write(out, unfinished.features, about, rows(stores, unfinished))
        return about, images_per_sec
    except OSError as error:
        kept = "what is finished is kept, run the same command again to continue"
        raise RunError(f"{error.filename or out}: {reason(error)}; {kept}") from None


def network_of(trained: Trained, layer: str) -> tuple[nn.Module, int]:
    """The network (N, 3, size, size) → (N, F) up to a layer, and F. Raises UserError."""
    network, size = trained.encoder, trained.preprocessing.size
    if layer == "projection":
        network = nn.Sequential(network, trained.projector)
    elif layer:
        network = Layer(network, layer, size)
        note(network.about)
    with torch.no_grad():
        return network, network(torch.zeros(2, 3, size, size)).shape[1]


def settings_of(
    options: EmbedConfig, trained: Trained, stores: dict[str, Blanks], device: torch.device
) -> dict[str, Any]:
    """What decides the features, to the bit on one machine; values as JSON has them."""
    names = ("layer", "normalize", "precision", "batch_size")
    return json.loads(
        json.dumps(
            {
                "step": trained.step, "checkpoint": trained.digest, "arch": trained.config.encoder.arch,
                **{name: getattr(options, name) for name in names}, "device": device.type,
                "preprocessing": trained.preprocessing._asdict(),
                "splits": {split: store.num_samples for split, store in stores.items()},
                "fingerprints": {split: store.fingerprint for split, store in stores.items()},
            }
        )
    )  # fmt: skip


@torch.no_grad()
def extract(work: Work, stores: dict[str, Blanks], unfinished: Unfinished) -> float:
    """Append the features that are missing; returns the images per second of this run."""
    work.network.to(work.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    left, count = unfinished.progress.batches, 0
    total = sum(store.num_samples for store in stores.values())
    done = unfinished.progress.images + len(unfinished.progress.failed)
    start = time.perf_counter()
    with full_precision(), progress(total, done, "features") as advance:
        for split, store in stores.items():
            steps = Order(store.num_samples, work.options.batch_size, shuffle=False).steps_per_epoch
            if left < steps:
                for index_B, label_B, rows_BF in features(work, store, left):
                    append(unfinished, split, store, index_B, label_B, rows_BF)
                    advance(len(index_B))
                    count += len(index_B)
            left = max(0, left - steps)
    return count / (time.perf_counter() - start)


def features(work: Work, store: Store, first: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Places in the store, labels and features (B, F) fp32, from a batch on, in the store's order."""
    size, _crop, mean, std = work.preprocessing
    options, at = work.options, first * work.options.batch_size
    batches = central_views(
        store, work.device, size=size, mean=mean, std=std, batch_size=options.batch_size, workers=work.workers,
        max_failed_fraction=0.0, labels=True, first=first,
    )  # fmt: skip
    for batch, views in batches:
        in_order(batch, at)
        at += len(batch)
        with torch.autocast(work.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            out_BF: Tensor = work.network(views)
        out_BF = out_BF.float()
        if options.normalize:
            out_BF = F.normalize(out_BF)
        assert batch.label_B is not None
        yield batch.index_B.numpy(), batch.label_B.numpy(), out_BF.cpu().numpy()


def in_order(batch: Batch, first: int) -> None:
    """Features under another image's name would be worse than none."""
    if batch.replaced or batch.index_B.tolist() != list(range(first, first + len(batch))):
        raise RuntimeError(f"the batch from image {first} on holds others: {batch.index_B.tolist()}")


def append(
    unfinished: Unfinished, split: str, store: Blanks, index_B: np.ndarray, label_B: np.ndarray, rows_BF: np.ndarray
) -> None:
    """One batch. Images that can't be read are named and have no row. Raises RunError where all of it is lost."""
    failed = []
    for index in filter(store.failed.__contains__, index_B.tolist()):
        error = store.failed[index]
        said = reason(error) if isinstance(error, OSError) else str(error)
        failed.append({"split": split, "index": index, "name": store.source_name(index), "reason": said})
        number = len(unfinished.progress.failed) + len(failed)
        if number <= NAMED_FAILURES:
            last = "; more of them are only counted" if number == NAMED_FAILURES else ""
            warn(f"{store.name(index)}: {said}; left out{last}")
    if len(failed) == len(index_B) >= LOST and all(isinstance(store.failed[i], OSError) for i in index_B.tolist()):
        raise RunError(f"no image of a whole batch can be read, the last is {failed[-1]['name']}: {said}")
    good = ~np.isin(index_B, [each["index"] for each in failed])
    unfinished.append(rows_BF[good], label_B[good], failed)


def rows(stores: dict[str, Blanks], unfinished: Unfinished) -> Iterator[Row]:
    """What stands beside each row of features, in their order."""
    labels, failed = unfinished.labels(), {(each["split"], each["index"]) for each in unfinished.progress.failed}
    for split, store in stores.items():
        for index in range(store.num_samples):
            if (split, index) not in failed:
                yield Row.of(store.source_name(index), split, next(labels), store.classes)
