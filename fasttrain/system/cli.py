"""How every command reads its options and ends: typed flags in, one clear line and a non-zero status on bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from fasttrain.system.durable import reason
from fasttrain.system.errors import EXIT_FAILURE, EXIT_USER_ERROR, DataError, RunError, UserError, printable
from fasttrain.system.options import flag
from fasttrain.system.signals import Stopped
from fasttrain.system.streams import Stream, keep_streams

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Parsed = TypeVar("Parsed", bound="DataclassInstance")
OWN_PACKAGES = "fasttrain", "benchmarks"


def parse(
    options: type[Parsed], argv: Sequence[str] | None = None, default: Parsed | None = None, positional: bool = False,
    about: str = "",
) -> Parsed:  # fmt: skip
    """Turn the command line into `options`, a dataclass whose docstrings are the help texts.

    default: an instance whose values replace the class's defaults (a preset). positional: fields without a default
    are given by place, or, as soon as one of them is, by flag. about: what --help says
    first, else the class's docstring.
    Raises SystemExit(2) after one line on stderr for a bad command line, SystemExit(0) after --help.
    """
    import tyro  # here, so that everything but the command line works without it

    argv = sys.argv[1:] if argv is None else argv
    required = [f.name for f in dataclasses.fields(options) if f.default is f.default_factory is dataclasses.MISSING]
    by_place = positional and not any(word.split("=")[0] in map(flag, required) for word in argv)
    places = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                options,
                args=argv,
                description=about or inspect.cleandoc(options.__doc__ or ""),
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.OmitArgPrefixes, *(places if by_place else ())),
            )
    except SystemExit as stop:
        if stop.code:
            fail(_one_line(captured.getvalue()) + " (--help lists the options)")
            raise SystemExit(EXIT_USER_ERROR) from None
        raise


def with_place(name: str, options: type[Parsed], argv: Sequence[str], default: Parsed) -> list[str]:
    """The command line with the one word that belongs to no option, if there is one, as the value of option `name`."""
    import tyro

    argv, nothing = list(argv), io.StringIO()
    if "--help" in argv or "-h" in argv:  # told by `parse`, once
        return argv
    try:
        with contextlib.redirect_stderr(nothing), contextlib.redirect_stdout(nothing):
            config = (tyro.conf.OmitArgPrefixes,)
            _, stray = tyro.cli(options, args=argv, default=default, config=config, return_unknown_args=True)
    except SystemExit:  # for a fault, which `parse` tells
        return argv
    if len(stray) != 1 or stray[0].startswith("-") or any(word.split("=")[0] == flag(name) for word in argv):
        return argv
    at = [place for place, word in enumerate(argv) if word == stray[0]]
    place = next((p for p in at if p == 0 or not argv[p - 1].startswith("-")), at[-1])  # not an option's value
    return [*argv[:place], *argv[place + 1 :], flag(name), stray[0]]


def _one_line(boxed: str) -> str:
    """The message inside tyro's box (in Unicode, or dashes for plain streams) and the options it suggests."""
    framed = "│" in boxed
    lines = [line.strip("│ \t") for line in boxed.splitlines() if not line.startswith(("╭", "╰"))]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line and not line.strip("─-"):
            parts.append([])
        elif line:
            parts[-1].append(line)
    message, *others = parts if framed else parts[1:] or parts  # a plain box has its title as the first part
    suggestions = [part for part in others if part and part[0].startswith(("Perhaps you meant", "Arguments similar"))]
    names = [line.split()[0] for part in suggestions for line in part if line.startswith("--")]
    return _options_only(" ".join(message)) + (f"; did you mean {' or '.join(names)}?" if names else "")


def _options_only(message: str) -> str:
    """tyro lists the values of unknown options among them: "Unrecognized options: --gpu, 1"."""
    title, colon, words = message.partition("Unrecognized options: ")
    options = [word for word in words.split(", ") if word.startswith("-")]
    return f"{title}{colon}{', '.join(options)}" if options else message


def warn(message: str) -> None:
    """Print one line on stderr."""
    print(f"warning: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """Print one line on stderr: which command failed and why."""
    line = printable(" ".join(str(message).split()))
    # in one piece: other ranks print to the same stream, perhaps without a buffer
    print(f"{pathlib.Path(sys.argv[0]).name}: error: {line}\n", end="", file=sys.stderr, flush=True)


def finish(main: Callable[[], int]) -> int:
    """Run a command's main and return its exit status; errors a person can cause become one line, never a traceback.

    Status: what main returns; 2 bad input; 1 it can't go on (disk full, permission, …), or its result could not be
    written to standard output; 130 Ctrl-C; 128 and more: stopped by a signal, with what is done saved. Standard streams
    that are gone or full do not end the command.
    """
    keep_streams()
    try:
        return _with_result(main())
    except (UserError, DataError) as error:
        fail(str(error))
        return EXIT_USER_ERROR
    except OSError as error:
        fail(said(error))
        return EXIT_FAILURE
    except RunError as error:
        fail(str(error))
        return EXIT_FAILURE
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in OWN_PACKAGES:
            raise
        fail(f"the package {error.name} is missing here: make install has all of them")
        return EXIT_FAILURE
    except Stopped as stopped:
        return 128 + stopped.number
    except KeyboardInterrupt:
        fail("interrupted")
        return 130


def _with_result(status: int) -> int:
    """The status of a command that is done, unless nobody has got its result."""
    sys.stdout.flush()
    if not (isinstance(sys.stdout, Stream) and sys.stdout.lost):
        return status
    fail("done, but the result could not be written to standard output")
    return status or EXIT_FAILURE


def said(error: OSError) -> str:
    """What the system says, after the file it is about, if that is known."""
    about = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{about}{reason(error)}"
