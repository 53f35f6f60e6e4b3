"""What a training run is: every group of options, their defaults, and how a command line or a file becomes them.

Defaults: the method's paper ← the preset ← the paper's for vision transformers, where --arch is one ← a --config file ←
another optimizer, recipe of views or consistency, where one is typed ← what is typed.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fasttrain.engine.options import OPTIMIZERS, MachineOptions, OptimisationOptions, warmup_that_fits
from fasttrain.input.options import DataOptions
from fasttrain.losses.options import CROSS_WEIGHTS
from fasttrain.methods import METHODS, MethodOptions, method_options
from fasttrain.networks.options import WIDTHS, EncoderOptions, is_outside, is_vision_transformer, may_have_cifar_stem
from fasttrain.presets import PRESETS
from fasttrain.run.folder import config_of, read_settings
from fasttrain.run.options import LoggingOptions, RunOptions
from fasttrain.system.errors import UserError
from fasttrain.system.options import Options, Settings, check_of_use, flag, flat, replaced
from fasttrain.views.options import AS_DRAWN, ViewOptions, resolution_sides
from fasttrain.views.spec import Recipe

# on which other defaults depend
SELECTORS = ("method", "preset", "config", "arch", "optimizer", "recipe", "cross", "resolution", "epochs")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Options):
    """Pre-train an image encoder with XMoCo, one of the methods it is compared with, or one of your own.

    The same command on an existing run folder continues from its newest good checkpoint. Exit status: 0 done; stopped
    by a signal after writing a checkpoint: 143 SIGTERM, 138 SIGUSR1, 130 SIGINT, 129 SIGHUP; 2 bad input; 1 anything
    else.
    """

    run: RunOptions
    """Which run, how it begins and what it keeps."""
    data: DataOptions
    """What is read, and how."""
    views: ViewOptions
    """How an image's views are drawn."""
    encoder: EncoderOptions
    """The network that is trained."""
    method: MethodOptions
    """The method's own."""
    optimisation: OptimisationOptions
    """Batch, optimizer, schedule, precision."""
    machine: MachineOptions
    """What the machine decides: results do not depend on it."""
    logging: LoggingOptions
    """What is told about the run while it lasts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.method) is not method_options(self.run.method):
            raise UserError(f"--method {self.run.method} has options of its own: make_config() has them")
        self.views.recipe_for(self.method.all_views)  # raises
        if self.optimisation.accumulate > 1 and self.method.over_batch:
            raise UserError(
                f"--accumulate {self.optimisation.accumulate}: the loss of --method {self.run.method} compares the "
                "images of a batch with one another, which micro-batches would part; use --checkpoint-activations, or "
                "more processes"
            )

    @property
    def recipe(self) -> Recipe:
        """How an image's views are drawn."""
        return self.views.recipe_for(self.method.all_views)


def make_config(method: str = "xmoco", preset: str = "imagenet", **values: Any) -> TrainConfig:  # noqa: ANN401
    """A configuration from Python: values by the names of the options, defaults as on a command line.

    A path may be any os.PathLike. Raises UserError for a name that this method does not have, and for values no run
    could use or that would change nothing.
    """
    values = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}
    defaults = _defaults(method, preset, {}, values)
    if unknown := sorted(set(values) - set(flat(defaults))):
        raise UserError(_foreign(unknown[0], method) or f"{method} has no option {flag(unknown[0])}")
    if values.get("resolution"):
        values = {"size": resolution_sides(values["resolution"])[1], **values}
    config = replaced(defaults, values)
    check_of_use(config, values)
    return config


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Read a command line. Raises SystemExit after its one line, and UserError."""
    import tyro  # here, so that everything but the command line works without it

    from fasttrain.system.cli import parse, with_place

    argv = [_with_dashes(word) for word in argv]
    typed = {name: value for name in (*SELECTORS, "size") if (value := _last(argv, flag(name))) is not None}
    saved = read_settings(pathlib.Path(typed["config"])) if typed.get("config") else {}
    _check_named(saved, typed.get("method", ""), typed.get("arch", ""), typed.get("config"))
    method = typed.get("method") or saved.get("method") or RunOptions.method
    preset = typed.get("preset") or saved.get("preset") or RunOptions.preset
    words = [word.partition("=")[0] for word in argv if word.startswith("--")]
    # a saved value that something else is typed for may be one that this method refuses
    replaceable = {*words} - {*map(flag, SELECTORS)}
    kept = {name: value for name, value in _kept(saved, method, preset).items() if flag(name) not in replaceable}
    given = {"data": tyro.MISSING, **kept}
    if typed.get("size") and not typed.get("resolution"):
        given["resolution"] = ""  # a saved one that ends with another size
    if typed.get("resolution"):
        given["size"] = resolution_sides(typed["resolution"])[1]
    # what belongs to the folder of the saved run is not for another
    given |= {"run": "", "fresh": False, "config": "", "method": method, "preset": preset}
    defaults = _defaults(method, preset, given, typed)
    own = {flag(name) for name in flat(defaults)}
    for word in words:
        if word not in own and (whose := _foreign(word.removeprefix("--").replace("-", "_"), method)):
            raise UserError(whose)
    config = parse(TrainConfig, with_place("run", TrainConfig, argv, defaults), defaults, about=_about(defaults))
    check_of_use(config, [word.removeprefix("--").replace("-", "_") for word in words])
    return config


def _defaults(method: str, preset: str, given: Mapping[str, Any], typed: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a method and a preset, with what is given by a file, that typed values then replace."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"unknown --preset {preset!r}; choose from: {', '.join(PRESETS)}")
    options = method_options(method)
    config = TrainConfig(
        RunOptions(method=method, preset=preset),  # type: ignore[arg-type]
        DataOptions(""), ViewOptions(), EncoderOptions(), options(), OptimisationOptions(), MachineOptions(),
        LoggingOptions(),
    )  # fmt: skip
    shared = {
        name
        for group in dataclasses.fields(config)
        for name in flat(getattr(config, group.name))
        if group.name != "method"
    }
    if twice := sorted(shared & set(flat(config.method))):
        raise UserError(f"--method {method}: {flag(twice[0])} is an option of all methods: give its own another name")
    values = {**flat(config.method), **options.paper, **PRESETS[preset], **options.presets.get(preset, {})}
    arch = str(typed.get("arch") or given.get("arch") or values.get("arch") or EncoderOptions.arch)
    if is_vision_transformer(arch):  # torchvision's have heads of their own
        values |= {name: v for name, v in options.paper_vit.items() if arch in WIDTHS or not name.startswith("vit_")}
    if not may_have_cifar_stem(arch):
        values.pop("cifar_stem", None)
    values |= _brought(values, given) | dict(given)
    values |= _brought(values, typed)
    if "warmup_epochs" not in given:
        values |= _shorter_warmup(values, typed.get("epochs"))
    return replaced(config, values)


def _brought(values: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What another optimizer, recipe of views and consistency than the present ones bring, where they are asked for."""
    brought: dict[str, Any] = {}
    if (name := asked.get("optimizer")) not in (None, values.get("optimizer", OptimisationOptions.optimizer)):
        brought |= {"optimizer": name, **OPTIMIZERS.get(str(name), {})}
    if (name := asked.get("recipe")) not in (None, values.get("recipe", ViewOptions.recipe)):
        brought |= {"recipe": name, **AS_DRAWN}
    if (name := asked.get("cross")) in CROSS_WEIGHTS and name != values.get("cross"):
        brought |= {"cross": name, "cross_weight": CROSS_WEIGHTS[name]}
    return brought


def _shorter_warmup(values: Mapping[str, Any], typed_epochs: Any) -> dict[str, float]:  # noqa: ANN401
    """A default warm-up, where it is meant for longer runs."""
    epochs = values.get("epochs", OptimisationOptions.epochs) if typed_epochs is None else typed_epochs
    if isinstance(epochs, str) and epochs.isdecimal():
        epochs = int(epochs)
    warmup_epochs = values.get("warmup_epochs", OptimisationOptions.warmup_epochs)
    fits = not isinstance(epochs, int) or epochs <= 0 or epochs > warmup_epochs
    return {} if fits else {"warmup_epochs": warmup_that_fits(warmup_epochs, epochs)}


def _kept(saved: Mapping[str, Any], method: str, preset: str) -> dict[str, Any]:
    """The saved options that are a start for a run of this method and preset: all of them where these are the same,
    else those that are not merely the defaults of what was saved."""
    before = saved.get("method", method), saved.get("preset", preset)
    if before == (method, preset):
        return dict(saved)
    usual = Settings.of(_defaults(*before, {}, {"arch": saved.get("arch")})).values
    kept = {name: value for name, value in saved.items() if name not in usual or usual[name] != value}
    if "cross" in kept and "cross_weight" in saved:  # else this consistency would bring a weight of its own
        kept["cross_weight"] = saved["cross_weight"]
    return kept


def _about(config: TrainConfig) -> str:
    """What --help says first: the command, and the method that was chosen."""
    own = inspect.cleandoc(type(config.method).__doc__ or "")
    others = f"--method is one of {', '.join(METHODS)}; --help with another one explains that one."
    return f"{inspect.cleandoc(TrainConfig.__doc__ or '')}\n\n--method {config.run.method}: {own}\n\n{others}"


def _with_dashes(word: str) -> str:
    """--batch_size as --batch-size; a word that is no flag as it is."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else word


def _last(argv: Sequence[str], name: str) -> str | None:
    """The last value that a flag is given, as `--name value` or `--name=value`."""
    found = None
    for place, word in enumerate(argv):
        if word == name and place + 1 < len(argv):
            found = argv[place + 1]
        elif word.startswith(f"{name}="):
            found = word.removeprefix(f"{name}=")
    return found


def _foreign(name: str, method: str) -> str:
    """Whose option it is, if it is one of other methods', as an error; "" otherwise."""
    owners = [other for other, options in METHODS.items() if name in flat(options()) and other != method]
    if name in flat(method_options(method)()):
        return ""
    return f"{flag(name)} is an option of --method {', '.join(owners)}, not of {method}" if owners else ""


def _check_named(saved: Mapping[str, Any], method: str, arch: str, where: object) -> None:
    """Raises UserError where a file states a method or an encoder from outside that is not named, too: a stranger's
    could run any code."""
    for name, named, outside in (("method", method, lambda value: ":" in value), ("arch", arch, is_outside)):
        stated = saved.get(name)
        if isinstance(stated, str) and outside(stated) and stated != named:
            raise UserError(f"{where} wants the code of {stated}, which runs only where {flag(name)} names it, too")


def load_config(run: pathlib.Path, method: str = "", arch: str = "") -> TrainConfig:
    """The configuration a run folder was made with.

    method, arch: of a run whose method or encoder is from outside, that. Raises UserError where it is not said, and
    when the folder is none of a run, or of an earlier version.
    """
    path = config_of(run)
    saved = read_settings(path)
    _check_named(saved, method, arch, path)
    try:
        return replaced(_defaults(saved["method"], saved["preset"], {}, {}), saved)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} can't be read as a run's configuration: {error}") from None
