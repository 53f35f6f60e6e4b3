"""The weights that a run is given before its first step, wherever they lie: a file, a library's, or another run's.

--init names those that its encoder starts from, --anchor those of the frozen encoder that it is compared with.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

from torch import Tensor, nn

from fasttrain.config import TrainConfig
from fasttrain.engine.ranks import Ranks
from fasttrain.networks.options import TIMM
from fasttrain.run.checkpoint import checkpoint_path
from fasttrain.run.folder import CONFIG, read_init
from fasttrain.system.errors import DataError, RunError, UserError
from fasttrain.system.options import flag
from fasttrain.trained import load_trained
from fasttrain.weights.fit import fit
from fasttrain.weights.foreign import heads_of
from fasttrain.weights.read import read_file
from fasttrain.weights.released import Released, timm_weights, torchvision_weights
from fasttrain.weights.timm_folder import TENSORS

INIT, ANCHOR = "init", "anchor"  # options


class Init(NamedTuple):
    """weights: of the encoder, by its names, on the CPU. line: what they are, for a person. record: for config.json."""

    weights: dict[str, Tensor]
    line: str
    record: dict[str, Any]


def sources(config: TrainConfig) -> dict[str, str]:
    """Where the weights come from, by option, of those that are named."""
    named = {INIT: config.encoder.init, ANCHOR: config.method.anchored_to}
    return {option: source for option, source in named.items() if source}


def initial_weights(config: TrainConfig, encoder: nn.Module, source: str = "", option: str = INIT) -> Init:
    """The encoder's of a source, else of what an option names. Raises UserError for a source that can't be read, or has
    none of the encoder's tensors, or not all: of --init, --init-partial takes those."""
    source = source or sources(config)[option]
    try:
        where, found = _found(source, config)
        fitted = fit(encoder, found.tensors, found.heads)
    except (UserError, DataError, RunError) as error:
        raise UserError(f"{flag(option)} {source}: {error}") from None
    here = config.encoder.arch.partition(".")[0]
    if found.arch and here.startswith(TIMM) and here != TIMM + found.arch:  # such as tf_efficientnet_b0, padded unlike
        fitted.notes.append(f"they are {found.arch}'s, which may compute something else with them")
    line = fitted.line(source, flag(option))
    if not fitted.whole and option == ANCHOR:
        raise UserError(f"{line}; an anchor is the whole of an encoder like this run's")
    if not fitted.whole and not config.encoder.init_partial:
        raise UserError(f"{line}; --init-partial takes what fits, and begins the others at random")
    record = {"source": where, "digest": found.digest, "taken": len(fitted.taken), "of": fitted.of}
    return Init(fitted.taken, line, {**record, "not_taken": list(fitted.not_taken)})


def all_initial_weights(config: TrainConfig, encoder: nn.Module, ranks: Ranks) -> dict[str, Init]:
    """What every option names that names any, the same on every rank. Raises UserError."""
    return {option: initial_weights_of_all(config, encoder, ranks, option) for option in sources(config)}


def initial_weights_of_all(config: TrainConfig, encoder: nn.Module, ranks: Ranks, option: str = INIT) -> Init:
    """The same on every rank; the first reads them first, as they may have to be fetched. Raises UserError."""
    first = ranks.together(lambda: initial_weights(config, encoder, option=option) if ranks.is_main else None)
    init = ranks.together(lambda: first or initial_weights(config, encoder, option=option))
    digest = ranks.share(init.record["digest"])

    def check() -> None:
        if init.record["digest"] != digest:
            raise UserError(f"{flag(option)} {sources(config)[option]} is another file than the first process reads")

    ranks.together(check)
    return init


def weights_started_from(run: pathlib.Path, config: TrainConfig, encoder: nn.Module) -> dict[str, Tensor]:
    """Those that a run's --init gave it. Raises UserError where they are not there any more."""
    record = read_init(run)
    try:
        init = initial_weights(config, encoder, record["source"])
    except UserError as error:
        raise UserError(f"the weights that {run} started from can't be had: {error}") from None
    if init.record["digest"] != record["digest"]:
        raise UserError(f"{record['source']} has changed since {run} started from it")
    return init.weights


def _found(source: str, config: TrainConfig) -> tuple[str, Released]:
    """Where the source lies, absolute if it is a path, and what it holds."""
    if source.startswith(TIMM):
        return source, timm_weights(source.removeprefix(TIMM))
    path = pathlib.Path(os.path.abspath(source))
    if not os.path.lexists(path):
        return source, torchvision_weights(source, config.encoder.arch)
    if (path / TENSORS).is_file() and (path / CONFIG).is_file():  # as timm and export.py write it
        return str(path), timm_weights(f"local-dir:{path}")
    if path.is_dir():
        return _of_run(path, None, config)
    if path.parent.name == "checkpoints" and (path.parent.parent / CONFIG).exists():
        return _of_run(path.parent.parent, path, config)
    file = read_file(path)
    if isinstance(file.content, dict) and {"format", "method", "loader"} <= file.content.keys():
        raise UserError("a checkpoint of a run tells its encoder only inside of its run folder, in RUN/checkpoints")
    return str(path), Released(file.tensors, file.digest)


def _of_run(run: pathlib.Path, checkpoint: pathlib.Path | None, config: TrainConfig) -> tuple[str, Released]:
    """The encoder of a run that is evaluated, of its newest checkpoint or of one that is named."""
    trained = load_trained(run, checkpoint=checkpoint, method=config.run.method, arch=config.encoder.arch)
    path = checkpoint or checkpoint_path(run / "checkpoints", trained.step)
    return os.path.abspath(path), Released(trained.encoder.state_dict(), trained.digest, heads_of(trained.encoder))
