"""RUN/report.html: all that a run folder tells, on one page that needs no other file."""

from __future__ import annotations

import base64
import io
import pathlib

from PIL import Image

from fasttrain.page.accuracy import accuracy
from fasttrain.page.curves import training
from fasttrain.page.headlines import headlines
from fasttrain.page.health import health
from fasttrain.page.history import History
from fasttrain.page.machine import machine
from fasttrain.page.other_runs import beside
from fasttrain.page.representation import sections
from fasttrain.page.settings import settings
from fasttrain.page.shell import section, write_page
from fasttrain.system.cli import warn
from fasttrain.system.regular import read_at_most

PICTURE_BYTES = 1 << 26


def write_run_page(history: History) -> pathlib.Path:
    """Write the page of a run, and return its path."""
    path = history.run / "report.html"
    damaged = f"<p class=note>{history.damaged:,} damaged line(s) of metrics.jsonl are left out.</p>"
    parts = (
        headlines(history), accuracy(history), beside(history), training(history),
        damaged if history.damaged else "", health(history), *sections(history.run), _views(history.run),
        machine(history), settings(history),
    )  # fmt: skip
    write_page(path, history.name, parts, "run")
    return path


def _views(run: pathlib.Path) -> str:
    picture = _png(run / "samples.png")
    alt = "source images and their augmented views"
    image = f'<figure class=wide><img alt="{alt}" src="data:image/png;base64,{picture}"></figure>' if picture else ""
    note = "Source images, and the views made of each before the first step."
    return section("Views", image, note=note)


def _png(path: pathlib.Path) -> str:
    """A PNG in base64; "" where there is none, or, with a warning, a damaged one."""
    try:
        content = read_at_most(path, PICTURE_BYTES)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.verify()
        return base64.b64encode(content).decode()
    except FileNotFoundError:
        return ""
    except Exception as error:  # Pillow raises many kinds for damage
        warn(f"{path} is left out of the report: {getattr(error, 'strerror', None) or 'it is damaged'}")
        return ""
