"""What is told of the progress: plain lines into files, a bar on terminals."""

import io
import re
import sys

import pytest

from fasttrain.system import progress as module
from fasttrain.system.progress import progress


def test_lines_tell_how_far_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with progress(100, done=20, title="features") as advance:
        advance(0)
        advance(30)
        advance(50)
    first, last = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"features: 50/100 images, \d+ images/s, \d+ s left", first)
    assert re.fullmatch(r"features: 100/100 images, \d+ images/s, 0 s left", last)


def test_what_is_quickly_done_needs_no_line(capfd: pytest.CaptureFixture[str]) -> None:
    with progress(2) as advance:
        advance(1)
        advance(1)
    assert capfd.readouterr().err == ""


def test_a_quiet_one_says_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    for quiet in (True, False):
        with progress(10, quiet=quiet) as advance:
            advance(5)
        assert (capfd.readouterr().err == "") == quiet


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress(100, title="features") as advance:
        advance(40)
        advance(60)
    assert "features" in screen.getvalue()
    assert "100/100" in screen.getvalue()
