"""A run's settings, those that differ from its preset's first; how it was started, and on what."""

from __future__ import annotations

from typing import Any

from fasttrain.config import make_config
from fasttrain.page.history import History
from fasttrain.page.numbers import count
from fasttrain.page.shell import folded, pairs, section, table, text
from fasttrain.run.earlier import named_now
from fasttrain.system.errors import UserError
from fasttrain.system.options import Settings, flag

BRINGING = ("arch", "optimizer", "recipe")  # options that bring others' values: those are no change of their own
PLACES = {"run", "data", "config", "fresh", "method", "preset"}  # said elsewhere, and others in every run


def settings(history: History) -> str:
    """The sections on settings and on how the run was started."""
    values = {name.replace("_", " "): value for name, value in named_now(history.config).items()}
    usual = defaults(history.config)
    changed = changes(history.config, usual)
    rows = pairs(
        ((flag(name), f"{text(shown(value))}<small>instead of {text(shown(usual[name]))}</small>")
         for name, value in changed.items()), "settings",
    )  # fmt: skip
    preset, method = (text(history.config.get(name, "?")) for name in ("preset", "method"))
    note = f"What differs from the defaults of --method {method} --preset {preset} stands first."
    if not usual:
        own = ":" in str(history.config.get("method"))
        note = "What the defaults of this method are, only its own code knows." if own else "No preset is recorded."
    everything = pairs(((name, text(shown(value))) for name, value in values.items()), "settings")
    return section(
        "Settings", rows or ("<p>All settings are the defaults.</p>" if usual else ""),
        folded("all settings", everything), note=note,
    ) + section("How it was run", *_how(history))  # fmt: skip


def defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the same method and preset without a change, in JSON's values; {} for a method of others' code,
    which a page does not run."""
    method, preset = config.get("method"), config.get("preset")
    if not (isinstance(method, str) and isinstance(preset, str)) or ":" in method:
        return {}
    for names in (BRINGING, ()):
        typed = {name: config[name] for name in names if isinstance(config.get(name), str)}
        try:
            found = Settings.of(make_config(method, preset, **typed)).values
            plain = Settings.of(make_config(method, preset)).values
        except (UserError, TypeError, ValueError):
            continue
        return {**found, **{name: plain[name] for name in BRINGING}}
    return {}


def changes(config: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """The settings with other values than these."""
    now = named_now(config)
    return {name: now[name] for name in usual if name in now and name not in PLACES and now[name] != usual[name]}


def shown(value: object) -> str:
    """A setting's value in words."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value)) or "none"
    if isinstance(value, bool) or value in ("", None):
        return {True: "yes", False: "no"}.get(bool(value), "no") if isinstance(value, bool) else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _how(history: History) -> list[str]:
    """Machine and versions, first weights and an anchor's, and each start."""
    starts = history.starts
    facts = {name: str(value) for name, value in history.environment.items()}
    for option, said in (("init", "first weights"), ("anchor", "anchor")):
        if isinstance(record := history.record.get(option), dict):
            facts |= {f"{said}, {name}": str(record[name]) for name in ("source", "digest") if name in record}
    if starts:
        facts |= {"processes": str(starts[-1]["processes"]), "started": starts[0]["time"]}
        facts |= {"commit": starts[-1]["commit"]} if starts[-1]["commit"] else {}
    if history.shuffle:
        facts["shuffle of the images"] = history.shuffle
    if history.fingerprint:
        facts["images' fingerprint"] = history.fingerprint[:16]
    commands = [start["command"] for start in starts if start["command"]]
    command = f"<pre>{text(commands[-1])}</pre>" if commands else ""
    rows = [(f"{each['step']:,}", each["time"], str(each["processes"]), each["commit"] or "–") for each in starts]
    again = table(("from step", "time", "processes", "commit"), rows) if len(rows) > 1 else ""
    return [pairs(((name, text(value)) for name, value in facts.items()), "settings"), command,
            folded(f"started {count(len(rows))} times", again)]  # fmt: skip
