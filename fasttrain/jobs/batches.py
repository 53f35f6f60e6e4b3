"""What a run's batches are: images in their seeded order, and how ranks, micro-batches and batch norm cut them."""

from __future__ import annotations

from fasttrain.config import TrainConfig
from fasttrain.engine.ranks import Ranks
from fasttrain.input import Loader, Order, Place, Shuffle, Store, open_loader, seems_labelled
from fasttrain.input.options import CacheOptions
from fasttrain.input.stores import Shards
from fasttrain.methods import Method
from fasttrain.networks.batch_norm import has_batch_norm, is_split
from fasttrain.networks.groups import Groups, check_groups, check_rows
from fasttrain.system.cores import machine_size
from fasttrain.system.errors import UserError


def check_cache(place: Place, store: Store, shuffle: Shuffle, processes: int, options: CacheOptions) -> str:
    """A line on a cache that holds a part of what is shuffled globally; "" for what is read well, or lies here.

    processes: of all machines. Raises UserError for a cache that does not hold what is read at once.
    """
    capacity = place.near.capacity()
    if capacity is None or not isinstance(store, Shards):
        return ""
    here = min(shuffle.lanes, -(-shuffle.lanes * machine_size() // processes))
    needed = 2 * max(1, here) * store.largest
    if capacity < needed:
        at_once = f"{here} shards are read at once" if here else "a shard"
        disk = "" if options.cache_gb * 1e9 <= capacity else f", and its disk leaves {capacity / 1e9:.2g}"
        raise UserError(
            f"--cache-gb {options.cache_gb:g}{disk}: {at_once} of up to {store.largest / 1e9:.2g} GB, and the next "
            f"ones, take {needed / 1e9:.2g} GB; or choose a smaller --shuffle-window"
        )
    if shuffle.lanes or store.num_bytes <= capacity:
        return ""
    sizes = f"{store.num_bytes / 1e9:.2g} GB, and a cache of {capacity / 1e9:.2g} GB"
    return f"--shuffle global needs all shards all the time: of {sizes}, most come again and again; by block, each once"


def make_order(store: Store, shuffle: Shuffle, config: TrainConfig, ranks: Ranks) -> Order:
    """The seeded order of the samples. Raises UserError for a batch that can't be."""
    batch_size, accumulate = config.optimisation.batch_size, config.optimisation.accumulate
    if batch_size > store.num_samples:
        raise UserError(f"--batch-size {batch_size} is larger than the data set ({store.num_samples} images)")
    parts = ranks.world_size * accumulate
    if batch_size % ranks.world_size or batch_size // ranks.world_size < 2:
        raise UserError(
            f"--batch-size {batch_size} must be a multiple of the {ranks.world_size} process(es), 2 or more each"
        )
    if batch_size // ranks.world_size % accumulate or batch_size < 2 * parts:
        raise UserError(f"--batch-size {batch_size} can't be cut into {parts} equal parts (--accumulate) of 2 or more")
    return Order(
        store.num_samples, batch_size, config.run.seed, True, ranks.rank, ranks.world_size, shuffle.lanes,
        shuffle.block_S,
    )  # fmt: skip


def make_loader(store: Store, order: Order, config: TrainConfig, ranks: Ranks) -> Loader:
    """The samples in an order. Raises UserError for missing labels."""
    needs, probes = config.method.needs_labels, config.logging.online_probe
    if (needs or probes) and not (store.classes and seems_labelled(store)):
        whose = f"--method {config.run.method}" if needs else "--online-probe"
        raise UserError(f"{whose} needs labels, and {config.data.data} has images without")
    workers = ranks.threads(config.machine.workers)
    return open_loader(
        store, order, workers, config.data.loader, ranks.device, config.data.max_failed_fraction,
        labels=needs or probes, needs_labels=needs,
    )  # fmt: skip


def make_groups(config: TrainConfig, method: Method, ranks: Ranks) -> Groups | None:
    """How batch norm cuts each micro-batch; None: not at all. Raises UserError where a query could tell its key by the
    cut, and where a head has too few rows."""
    optimisation, kind, number = config.optimisation, config.encoder.batch_norm, config.encoder.batch_norm_groups
    cut = optimisation.batch_size, ranks.world_size, optimisation.accumulate
    if any(has_batch_norm(network) for name, network in method.named_children() if "encoder" not in name):
        check_rows(*cut, kind, number, machine_size())
    return check_groups(*cut, number) if is_split(method.encoder) else None
