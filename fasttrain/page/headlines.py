"""The top of a run's page: how it ended, what it reached, and what that is to be compared with."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from fasttrain.page.history import History
from fasttrain.page.numbers import count, short
from fasttrain.page.shell import Html, pairs, text
from fasttrain.run.evaluations import CHECKPOINT, NAMES, Evaluation

SUBTITLE = ("method", "arch", "data")
BRIEF = 60  # characters of settings that stand open
MARKED = "untrained", "majority"  # on the track of an accuracy, each in a look of its own
STATES = {"done": "good", "failed": "bad", "killed": "bad"}


def headlines(history: History) -> str:
    """Title, state, accuracies and other figures."""
    names = [str(history.config.get(name, "?")) for name in SUBTITLE]
    subtitle = " · ".join([*names, str(history.environment.get("machine", "?"))])
    newest = newest_of_each(history.evaluations)
    return "".join(
        (
            f"<h1>{text(history.name)}</h1><p class=sub>{text(subtitle)}</p>", _state(history),
            _cards(newest, history.evaluations),
            pairs(((name, text(value)) for name, value in _facts(history)), "facts"), _behind(history, newest),
        )
    )  # fmt: skip


def newest_of_each(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The newest of each protocol and variant, of the run's own weights and of untrained ones; in a fixed order. Those
    of the projection come behind the encoder's."""
    newest = {(each.untrained, each.protocol, each.variant, each.of_projection): each for each in evaluations}
    order = [*NAMES, *sorted({each.protocol for each in evaluations} - {*NAMES})]

    def rank(key: tuple[bool, str, str, bool]) -> tuple[bool, int, int, str, bool]:
        untrained, protocol, variant, projection = key
        return untrained, order.index(protocol), len(variant), variant, projection

    return [newest[key] for key in sorted(newest, key=rank)]


def highest(found: Sequence[Evaluation | None]) -> list[int]:
    """The places of the best of several that were measured alike; none where they were not, or are all equal."""
    there = [each for each in found if each]
    alike = len({(each.fingerprint or each.data, asked_of(each)) for each in there}) == 1
    most = max((each.top1 for each in there), default=0.0)
    differ = any(each.top1 < most for each in there)
    return [place for place, each in enumerate(found) if each and each.top1 == most] if alike and differ else []


def top1_name(each: Evaluation) -> str:
    """As "semi-supervised 1pct top-1 of the projection, untrained"."""
    parts = [NAMES.get(each.protocol, each.protocol), each.variant.replace("_", " "), "top-1",
             "of the projection" if each.of_projection else ""]  # fmt: skip
    return " ".join(filter(None, parts)) + ", untrained" * each.untrained


def asked_of(each: Evaluation) -> str:
    """What a protocol was given: figures for which it differs are not measured alike."""
    return json.dumps(each.asked(), sort_keys=True)


def settings_of(each: Evaluation) -> str:
    """What a protocol was given, and what it found on the way, in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in each.settings.items())


def settings_cell(each: Evaluation) -> Html:
    """The same as HTML: the rest of long ones opens when it is asked for."""
    words = settings_of(each)
    if len(words) <= BRIEF:
        return Html(f"<small>{text(words)}</small>" if words else "")
    first, _, rest = words[BRIEF // 2 :].partition(", ")
    first = words[: BRIEF // 2] + first
    return Html(f"<details class=brief><summary>{text(first)}, …</summary><small>{text(rest)}</small></details>")


def counterpart(each: Evaluation, evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The newest of the same protocol, with the same settings, on the same images with untrained weights."""

    def of(one: Evaluation) -> tuple[object, ...]:
        asked = {name: value for name, value in one.asked().items() if name != CHECKPOINT}
        return one.protocol, one.variant, one.fingerprint or one.data, asked

    same = [other for other in evaluations if other.untrained and of(other) == of(each)]
    return same[-1] if same and not each.untrained else None


def _cards(newest: Sequence[Evaluation], evaluations: Sequence[Evaluation]) -> str:
    """One for each protocol: its headline, or, where it has none, its variants. Untrained ones stand in the cards."""
    trained = [each for each in newest if not each.untrained]
    headed = {each.protocol for each in trained if not each.variant}
    shown = [each for each in trained if not each.variant or each.protocol not in headed]
    alone = [each for each in newest if each.untrained and not each.variant and each.protocol not in headed]
    cards = "".join(_card(each, counterpart(each, evaluations)) for each in (*shown, *alone))
    return f"<div class=cards>{cards}</div>" if cards else ""


def _card(each: Evaluation, untrained: Evaluation | None) -> str:
    compared = {
        "untrained": untrained.top1 if untrained else None, "majority": each.majority, "balanced": each.balanced,
        "top-5": each.top5,
    }  # fmt: skip
    said = " · ".join(f"{_mark(name)}{name} {value:.1f}" for name, value in compared.items() if value is not None)
    interval = f"{each.low:.1f} to {each.high:.1f} at 95 %" if each.low is not None and each.high is not None else ""
    of = [f"{each.num_images:,} images of {text(pathlib.Path(each.data).name)}"] if each.num_images else []
    lines = (interval, said, _below(each, compared), ", ".join([*of, f"step {each.step:,}"]))
    first = " first" if each.protocol == "knn" and not each.untrained else ""
    return (
        f"<div class='card{first}'><b>{each.top1:.1f} %</b><span>{text(top1_name(each))}</span>"
        f"{_track(each, compared)}{''.join(f'<small>{line}</small>' for line in lines if line)}"
        f"{settings_cell(each)}</div>"
    )


def _mark(name: str) -> str:
    """How the track marks it: what follows is told of the same look."""
    return f"<i class='at {name}'></i>" if name in MARKED else ""


def _below(each: Evaluation, compared: dict[str, float | None]) -> str:
    """What should be above both of what it is compared with, and is not."""
    above = [name for name in MARKED if (value := compared[name]) is not None and value >= each.top1]
    return f"<em>not above {' and '.join(above)}</em>" if above and not each.untrained else ""


def _track(each: Evaluation, compared: dict[str, float | None]) -> str:
    """The figure on the way from 0 to 100, with its interval, and marks where untrained weights and guessing are."""
    marks = {name: value for name in MARKED if (value := compared[name]) is not None}
    at = "".join(f"<i class='at {name}' style='left:{value:.1f}%'></i>" for name, value in marks.items())
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
