"""Calls to a store that is far away: each has a time limit, is tried again a few times, and ends in one line.

No line holds a secret: user names, passwords and queries of URLs, where tokens and signatures stand, are left out.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from fasttrain.formats.boundary import one_line
from fasttrain.system.errors import RunError, UserError, note
from fasttrain.system.watch import ARRIVALS, Watch
from fasttrain.system.workers import Workers

SECONDS = 60.0  # for a look at one file, or a block of it
LISTING_SECONDS = 600.0  # for a folder, whatever lies in it
TRIES = 4  # in a row; one that succeeds starts the count anew
PAUSE_SECONDS = 1.0  # after the first failure, doubled after each further one
LONGEST_PAUSE = 10.0  # so that storage is asked several times in the minute that a run waits for it
TOLD = 20  # failures that are told, of all

Result = TypeVar("Result")

# Up to the last @ before the first slash: a password may hold one, or a slash. One further on is of the path.
_USER = re.compile(r"(?<=://)(?:[^/\s]*|[^/@\s]*:[^@\s]*)@(?:[^/\s]*@)?")
_QUERY = re.compile(r"(https?://[^\s?#'\"]*)[?#][^\s'\"]*|\?[^\s?'\"]*=[^\s'\"]*")
# What the next try would raise as well: of a library, or for what was typed.
_FINAL = (IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError, TypeError, AttributeError)
_PASSING = (408, 425, 429)  # of the statuses 4xx of HTTP: too slow, too early, too many requests

_told_lock, _told = threading.Lock(), 0


class Cut(OSError):
    """A transfer ended before its end."""


def without_secrets(text: object) -> str:
    """Return text whose URLs are without user, password and query. Outside HTTP, `?` without `=` is a wildcard."""
    return _QUERY.sub(lambda found: f"{found[1] or ''}?…", _USER.sub("", str(text)))


def limited(call: Callable[[], Result], seconds: float) -> Result:
    """Return what a call gives; TimeoutError if it takes longer: its thread, which keeps nothing alive, is left."""
    worker = Workers(1)
    future = worker.submit(call)
    worker.close()
    try:
        return future.result(seconds)
    except FutureTimeout:
        if future.done():  # the call itself raised it
            raise
        raise TimeoutError(f"no answer for {seconds:g} s") from None


class Tries:
    """Counts the failures in a row of what is done with one file."""

    def __init__(self, about: str, ended: threading.Event | None = None, patient: bool = False) -> None:
        """about: names it in messages, without secrets. ended: nobody waits for it any more. patient: storage that
        does not answer is waited for, however long that takes."""
        self.about, self.failures, self._ended = about, 0, ended or threading.Event()
        self._cuts, self._patient = 0, patient

    def succeeded(self) -> None:
        """A part has come."""
        self.failures = self._cuts = 0
        ARRIVALS.came()

    def failed(self, error: Exception) -> None:
        """Wait before another try.

        Raises:
            UserError: no other try would do better: it is missing, forbidden, of an unknown kind.
            RunError: it was the last try.
        """
        if isinstance(error, UserError | RunError | ImportError) or self._ended.is_set():
            raise error
        final, reason = _judged(error)
        if final:
            raise UserError(f"{self.about}: {reason}") from None
        ARRIVALS.trouble = f"{self.about}: {reason}"
        self.failures, self._cuts = self.failures + 1, self._cuts + isinstance(error, Cut)
        if (self._cuts if self._patient else self.failures) >= TRIES:
            again = "" if self._patient else ", run the same command again to continue"
            raise RunError(f"{self.about}: {reason}: given up after {TRIES} tries{again}") from None
        pause = min(LONGEST_PAUSE, PAUSE_SECONDS * 2 ** min(self.failures - 1, 10))
        _tell(f"{self.about}: {reason}: tried again in {pause:g} s")
        self._ended.wait(pause)


def tried(call: Callable[[], Result], about: str, seconds: float | None = None) -> Result:
    """Return what a call gives, after a few tries; a line tells of a slow one. Raises what Tries.failed does."""
    tries, watch = Tries(about), Watch("answer", str)
    with watch.patrol(), watch.at(about):
        while True:
            try:
                return limited(call, seconds or SECONDS)
            except Exception as error:
                tries.failed(error)


def _tell(text: str) -> None:
    global _told
    with _told_lock:
        _told += 1
        if _told <= TOLD:
            note(text if _told < TOLD else f"{text}; further failures are not told")


def _judged(error: Exception) -> tuple[bool, str]:
    """Return whether an error is final, and its reason in one line."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec's HTTP says "not found" whatever it was
    if (status := _status(error)) is not None:
        meaning = {401: "no permission: ", 403: "no permission: ", 404: "not found: "}.get(status, "")
        return 400 <= status < 500 and status not in _PASSING, f"{meaning}HTTP {status}"
    if isinstance(error, FileNotFoundError):
        return True, "not found"
    if isinstance(error, PermissionError):
        return True, "no permission"
    if "Credential" in type(error).__name__:
        return True, "no credentials: they are those of its own library, in the environment or its files"
    if isinstance(error, TimeoutError):
        return False, str(error) if str(error).startswith("no answer") else "no answer in time"
    reason = str(error) if isinstance(error, Cut) else f"{type(error).__name__}: {error}"
    final = isinstance(error, _FINAL) and not isinstance(error, json.JSONDecodeError)  # as of a gateway's page
    return final, one_line(without_secrets(reason))


def _status(error: Exception) -> int | None:
    """Return the status of HTTP that an error of any library tells of."""
    if "http_exceptions" in type(error.__cause__).__module__:  # of aiohttp's own: what came was no answer at all
        return None
    response = getattr(error, "response", None)
    of_boto = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    of_others = (getattr(error, "status", None), getattr(response, "status_code", None), getattr(error, "code", None))
    found = (of_boto, *of_others)
    return next((number for number in found if isinstance(number, int) and 400 <= number < 600), None)
