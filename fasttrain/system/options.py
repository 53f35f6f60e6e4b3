"""Options as typed fields of frozen dataclasses. A field carries its own bounds, and whether its value binds a run.

    @dataclass(frozen=True)
    class StepOptions(Options):
        batch_size: Positive[int] = 256
        device: Free[Literal["auto", "cpu", "cuda"]] = "auto"

Groups of options nest; outside of Python, as flags and in files, every option goes by its own name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from fasttrain.system.errors import UserError

Value = TypeVar("Value")
Group = TypeVar("Group", bound="Options")


class Bounds(NamedTuple):
    """low ≤ value ≤ high; without the ends where they are open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False  # infinity itself is outside

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        above = value > self.low if self.low_open else value >= self.low
        return above and value < math.inf and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "finite"
        low = f"{'above' if self.low_open else 'at least'} {_digits(self.low)}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.high_open else 'at most'} {_digits(self.high)}"


def _digits(number: float) -> str:
    """A number as it is typed: a whole one without a power of ten, however large."""
    return str(number) if isinstance(number, int) else f"{number:g}"


class With(NamedTuple):
    """In a field's type: it is of use only where another option, of any group, has one of these values or, of none, is
    not off: 0, empty, False or "none"."""

    option: str
    values: tuple[str, ...] = ()

    def among(self, values: Mapping[str, Any]) -> bool:
        value = values[self.option]
        return value in self.values if self.values else bool(value) and value != "none"

    def __str__(self) -> str:
        return " ".join(filter(None, (flag(self.option), " or ".join(self.values))))


FREE = "free"  # in a field's type: a run may be continued with another value
Free = Annotated[Value, FREE]
GROWS = "grows"  # …: with the values it had, and more after them
Growing = Annotated[Value, GROWS]
Positive = Annotated[Value, Bounds(0, low_open=True)]
Several = Annotated[Value, Bounds(2)]  # of which one says nothing
NotNegative = Annotated[Value, Bounds(0)]
Finite = Annotated[Value, Bounds(low_open=True)]
Fraction = Annotated[Value, Bounds(0, 1)]  # both ends included
Momentum = Annotated[Value, Bounds(0, 1, high_open=True)]


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of every group. A value of another type, or outside its field's bounds, raises UserError: in Python, too."""

    def __post_init__(self) -> None:
        for name, (kind, marks) in _fields(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, kind) and not type(value).__module__.startswith("tyro"):  # which marks what is missing
                raise UserError(f"{flag(name)} can't be {value!r}{_choices(kind)}")
            for bounds in marks:
                numbers = value if isinstance(value, tuple) else (value,)
                outside = (n for n in numbers if isinstance(n, int | float) and n not in bounds)
                if isinstance(bounds, Bounds) and next(outside, None) is not None:
                    raise UserError(f"{flag(name)} must be {bounds}, not {value}")


def flag(name: str) -> str:
    """An option's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def _fields(group: type) -> dict[str, tuple[Any, tuple]]:
    """The type of each field, and what stands beside it: Bounds, With, FREE, GROWS."""
    kinds, hints = get_type_hints(group), get_type_hints(group, include_extras=True)
    names = [field.name for field in dataclasses.fields(group)]
    return {name: (kinds[name], getattr(hints[name], "__metadata__", ())) for name in names}


def _fits(value: object, kind: Any) -> bool:  # noqa: ANN401 - a type, or what typing makes of several
    """Is a value of a field's type? An int is a float, too."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(each) and all(map(_fits, value, each))
    if kind in (int, float) and isinstance(value, int | float):
        return not isinstance(value, bool) and (kind is float or isinstance(value, int))
    return not isinstance(kind, type) or isinstance(value, kind)


def _choices(kind: Any) -> str:  # noqa: ANN401 - see _fits
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return f"; choose from: {', '.join(map(str, choices))}" if choices else ""


def flat(options: Options) -> dict[str, Any]:
    """Every option of a group and of the groups in it, by name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        values |= flat(value) if isinstance(value, Options) else {field.name: value}
    return values


def replaced(options: Group, values: Mapping[str, Any]) -> Group:
    """The group with other values for options of these names, in it or in its groups; other names are passed over."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Options):
            changes[field.name] = replaced(value, values)
        elif field.name in values:
            given = values[field.name]
            changes[field.name] = tuple(given) if isinstance(given, list) else given  # JSON has no tuples
    return dataclasses.replace(options, **changes)


def check_of_use(options: Options, given: Collection[str]) -> None:
    """Raises UserError for an option, of those given, that would change nothing, as the other one that it needs was
    forgotten. Where that was given, too, it is meant to be off: in one run of several, say."""
    values = flat(options)
    for name, marks in _marks(options).items():
        for other in marks:
            if isinstance(other, With) and not other.among(values) and name in given and other.option not in given:
                raise UserError(f"{flag(name)} is of use only with {other}")


def _marks(options: Options) -> dict[str, tuple]:
    """What stands beside the type of every option of a group and of the groups in it."""
    marks: dict[str, tuple] = {}
    for name, (_kind, own) in _fields(type(options)).items():
        value = getattr(options, name)
        marks |= _marks(value) if isinstance(value, Options) else {name: own}
    return marks


def _marked(options: Options, mark: str) -> frozenset[str]:
    """Names of the options whose type bears a mark."""
    return frozenset(name for name, marks in _marks(options).items() if mark in marks)


class Settings(NamedTuple):
    """A run's options as they are kept in files: values of JSON by name, which of them do not bind the run or may grow,
    and what an option counts as in a file from before there was one: its field's default."""

    values: dict[str, Any]
    free: frozenset[str]
    growing: frozenset[str]
    before: dict[str, Any]

    @classmethod
    def of(cls, options: Options) -> Settings:
        values, before = (json.loads(json.dumps(each)) for each in (flat(options), _defaults(options)))
        return cls(values, _marked(options, FREE), _marked(options, GROWS), before)

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """'--name was X, now Y' for every option that binds a run and had another value."""
        saved = {**self.before, **saved}
        return [
            f"{flag(name)} was {saved.get(name)!r}, now {self.values.get(name)!r}{self._advice(name, saved.get(name))}"
            for name in {**self.values, **saved}
            if name not in self.free and not self._goes_on(name, saved.get(name))
        ]

    def _goes_on(self, name: str, saved: object) -> bool:
        """Does an option say what it said, or, where it may, that and more?"""
        if name in self.growing and isinstance(saved, list):
            return self.values[name][: len(saved)] == saved
        return self.values.get(name) == saved

    def _advice(self, name: str, saved: object) -> str:
        if name not in self.growing or not isinstance(saved, list):
            return ""
        return f": type {flag(name)} {' '.join(map(str, saved))} (more may follow)"


def _defaults(options: Options) -> dict[str, Any]:
    """The default of every field that has one, in a group and in the groups in it."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Options):
            values |= _defaults(value)
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
    return values
