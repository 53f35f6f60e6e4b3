"""The top of a run's page: how it ended, what it reached, and what that is to be compared with."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from fasttrain.page.history import History
from fasttrain.page.numbers import count, short
from fasttrain.page.shell import pairs, section, table, text
from fasttrain.run.evaluations import NAMES, Evaluation, read_evaluations
from fasttrain.run.folder import CONFIG, read_record
from fasttrain.system.errors import UserError

SUBTITLE = ("method", "arch", "data")
MOST_SEARCHED, MOST_BESIDE = 300, 6  # folders beside the run's, and runs in them that are shown
BRIEF = 60  # characters of settings that stand open
STATES = {"done": "good", "failed": "bad", "killed": "bad"}


def headlines(history: History) -> str:
    """Title, state, accuracies and other figures."""
    names = [str(history.config.get(name, "?")) for name in SUBTITLE]
    subtitle = " · ".join([*names, str(history.environment.get("machine", "?"))])
    newest = newest_of_each(history.evaluations)
    return "".join(
        (
            f"<h1>{text(history.name)}</h1><p class=sub>{text(subtitle)}</p>", _state(history), _cards(newest),
            pairs(((name, text(value)) for name, value in _facts(history)), "facts"), _behind(history, newest),
        )
    )  # fmt: skip


def beside(history: History) -> str:
    """The newest other runs of the same images in the folder that the run lies in."""
    if not history.fingerprint:
        return ""
    runs = [(history.run, history.record["config"], history.evaluations), *_others(history)]
    reached = [
        {each.protocol: each for each in newest_of_each(evaluations) if not (each.untrained or each.variant)}
        for *_, evaluations in runs
    ]
    protocols = list(dict.fromkeys(protocol for each in reached for protocol in each))
    if len(runs) == 1 or not protocols:
        return ""
    rows = []
    for (run, config, _), of in zip(runs, reached, strict=True):
        step = max((each.step for each in of.values()), default=None)
        words = [str(config.get(name, "?")) for name in ("method", "arch")]
        top1 = (f"{of[protocol].top1:.1f}" if protocol in of else "–" for protocol in protocols)
        rows.append([_linked(run, history.run), *words, "–" if step is None else f"{step:,}", *top1])
    best = [(row, 4 + place) for place, p in enumerate(protocols) for row in highest([of.get(p) for of in reached])]
    head = ("run", "method", "encoder", "step evaluated", *(f"{NAMES.get(p, p)} top-1, %" for p in protocols))
    note = "The newest runs in the same folder, trained on the same images. Green: the best of figures measured alike."
    return section("Other runs of the same images", table(head, rows, best), note=note)


def _linked(run: pathlib.Path, own: pathlib.Path) -> str:
    """A run's name, with its page behind it."""
    name = run.resolve().name
    if run == own:
        return f"<b>{text(name)}, this run</b>"
    page = quote(os.fsencode(f"../{name}/report.html"))
    return f'<a href="{page}">{text(name)}</a>' if (run / "report.html").exists() else text(name)


def newest_of_each(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The newest of each protocol and variant, of the run's own weights and of untrained ones; in a fixed order."""
    newest = {(each.untrained, each.protocol, each.variant): each for each in evaluations}
    order = [*NAMES, *sorted({each.protocol for each in evaluations} - {*NAMES})]
    return [newest[key] for key in sorted(newest, key=lambda key: (key[0], order.index(key[1]), key[2]))]


def highest(found: Sequence[Evaluation | None]) -> list[int]:
    """The places of the best of several that were measured alike; none where they were not, or are all equal."""
    there = [each for each in found if each]
    alike = len({(each.fingerprint or each.data, settings_of(each)) for each in there}) == 1
    most = max((each.top1 for each in there), default=0.0)
    differ = any(each.top1 < most for each in there)
    return [place for place, each in enumerate(found) if each and each.top1 == most] if alike and differ else []


def top1_name(each: Evaluation) -> str:
    """As "semi-supervised 1pct top-1 of the projection, untrained"."""
    parts = [NAMES.get(each.protocol, each.protocol), each.variant.replace("_", " "), "top-1",
             "of the projection" if each.settings.get("features") == "projection" else ""]  # fmt: skip
    return " ".join(filter(None, parts)) + ", untrained" * each.untrained


def settings_of(each: Evaluation) -> str:
    """What a protocol was given, in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in each.settings.items())


def settings_cell(each: Evaluation) -> str:
    """The same as HTML: the rest of long ones opens when it is asked for."""
    words = settings_of(each)
    if len(words) <= BRIEF:
        return f"<small>{text(words)}</small>" if words else ""
    first, _, rest = words[BRIEF // 2 :].partition(", ")
    first = words[: BRIEF // 2] + first
    return f"<details class=brief><summary>{text(first)}, …</summary><small>{text(rest)}</small></details>"


def counterpart(each: Evaluation, evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The newest of the same protocol on the same images with untrained weights."""

    def of(one: Evaluation) -> tuple[str, str, str]:
        return one.protocol, one.variant, one.fingerprint or one.data

    same = [other for other in evaluations if other.untrained and of(other) == of(each)]
    return same[-1] if same and not each.untrained else None


def _cards(newest: Sequence[Evaluation]) -> str:
    """One for each protocol: its headline, or, where it has none, its variants. Untrained ones stand in the cards."""
    trained = [each for each in newest if not each.untrained]
    headed = {each.protocol for each in trained if not each.variant}
    shown = [each for each in trained if not each.variant or each.protocol not in headed]
    alone = [each for each in newest if each.untrained and not each.variant and each.protocol not in headed]
    cards = "".join(_card(each, counterpart(each, newest)) for each in (*shown, *alone))
    return f"<div class=cards>{cards}</div>" if cards else ""


def _card(each: Evaluation, untrained: Evaluation | None) -> str:
    compared = {
        "untrained": untrained.top1 if untrained else None, "majority": each.majority, "balanced": each.balanced,
        "top-5": each.top5,
    }  # fmt: skip
    said = " · ".join(f"{name} {value:.1f}" for name, value in compared.items() if value is not None)
    interval = f"{each.low:.1f} to {each.high:.1f} at 95 %" if each.low is not None and each.high is not None else ""
    of = [f"{each.num_images:,} images"] if each.num_images else []
    lines = (interval, said, ", ".join([*of, f"step {each.step:,}"]))
    first = " first" if each.protocol == "knn" and not each.untrained else ""
    return (
        f"<div class='card{first}'><b>{each.top1:.1f} %</b><span>{text(top1_name(each))}</span>"
        f"{_track(each, compared)}{''.join(f'<small>{text(line)}</small>' for line in lines if line)}"
        f"{settings_cell(each)}</div>"
    )


def _track(each: Evaluation, compared: dict[str, float | None]) -> str:
    """The figure on the way from 0 to 100, with its interval, and marks where untrained weights and guessing are."""
    marks = [compared[name] for name in ("untrained", "majority")]
    at = "".join(f"<i class=at style='left:{value:.1f}%'></i>" for value in marks if value is not None)
    span = ""
    if each.low is not None and each.high is not None:
        span = f"<i class=range style='left:{each.low:.1f}%;width:{each.high - each.low:.1f}%'></i>"
    said = f"{each.top1:.1f} of 100, with marks at what untrained weights and guessing give"
    return f"<div class=track role=img aria-label='{said}'><i style='width:{each.top1:.1f}%'></i>{span}{at}</div>"


def _facts(history: History) -> list[tuple[str, str]]:
    """(what it is, figure) of the training itself."""
    if not history.entries:
        return []
    last, scale, planned = history.entries[-1], history.scale(), history.planned_steps()
    facts = [("steps", f"{last['step']:,}" + (f" of {planned:,}" if planned > last["step"] else ""))]
    if batch_size := history.number("batch_size"):
        facts += [("epochs", f"{scale.epoch(last['step']):.3g}"), ("images seen", count(batch_size * last["step"])),
                  ("training time", duration(scale.hours(last["step"])))]  # fmt: skip
    facts.append(("images per second", f"{history.throughput:,.0f}"))
    loss = last.get("loss")
    facts += [("last loss", short(loss))] if isinstance(loss, float) else []
    skipped = last.get("skipped")
    return facts + ([("steps skipped, not finite", f"{skipped:,}")] if skipped else [])


def duration(hours: float) -> str:
    """Hours in words."""
    seconds = round(3600 * hours)
    if seconds < 120:
        return f"{seconds} s"
    minutes, whole = round(seconds / 60), int(hours)
    return f"{minutes} min" if minutes < 120 else f"{whole} h {round(60 * (hours - whole))} min"


def _state(history: History) -> str:
    """How the run ended, where that is known."""
    state, line, step, when = (getattr(history.ending, name) for name in ("state", "line", "step", "time"))
    words = {
        "done": f"done at step {step:,}", "stopped": f"stopped {line} at step {step:,}",
        "failed": f"failed at step {step:,}: {line}", "killed": f"killed: {line}",
    }  # fmt: skip
    said = ", ".join(filter(None, (words.get(state, state), when)))
    return f"<p class='state {STATES.get(state, '')}'>{text(said)}</p>" if state != "unknown" else ""


def _behind(history: History, newest: Sequence[Evaluation]) -> str:
    """Where training has gone on since the accuracies were measured."""
    behind = sorted({each.step for each in newest if history.entries and each.step != history.step})
    if not behind:
        return ""
    done = " and ".join(f"{step:,}" for step in behind)
    return f"<p class=sub>The accuracy is that of step {done}; training has gone on to step {history.step:,}.</p>"


def _others(history: History) -> list[tuple[pathlib.Path, dict[str, Any], list[Evaluation]]]:
    """The newest other runs beside this one, of the same images: folder, settings, accuracies."""
    found: list[tuple[pathlib.Path, dict[str, Any], list[Evaluation]]] = []
    own = history.run.resolve()
    with contextlib.suppress(OSError):
        configs = [path / CONFIG for path in own.parent.iterdir() if path != own]
        dated = sorted(((path.stat().st_mtime, path) for path in configs if path.is_file()), reverse=True)
        for _, path in dated[:MOST_SEARCHED]:
            with contextlib.suppress(UserError, OSError):
                record = read_record(path)
                data = record.get("data")
                if isinstance(data, dict) and data.get("fingerprint") == history.fingerprint:
                    found.append((path.parent, record["config"], read_evaluations(path.parent)))
            if len(found) == MOST_BESIDE:
                break
    return found
