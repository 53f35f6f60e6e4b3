"""What a person sees of a run: two lines that stay at the bottom of a terminal, or a line now and then elsewhere.

    step 1234/48000  ━━━━━╸━━━━━━━━━━━━━━  0:41:07 left  1210 images/s  loss 5.1234
    epoch 3, lr 0.02998, contrastive accuracy 63.1%, positives 0.82, negatives 0.01, queue 37% full

The first holds what is always there; the second has as much of the rest as fits, after what is being done while no step
is: compiling, saving, evaluating.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fasttrain.run.health import MEMORY
from fasttrain.run.metrics import FIGURES, Entry
from fasttrain.run.pace import Pace, clock
from fasttrain.system.streams import tell_at_once

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
MOMENT = 5.0  # seconds after which a line there says what is being done
LEAST_BAR, MOST_BAR = 8, 60  # columns
GAP = 2
REFRESHES = 4  # a second
EVENTS = {  # of the figures of events, those that are said; the others are in metrics.jsonl
    "knn_top1": "kNN {:.2f} %", "knn_majority": "majority {:.2f} %", "rankme": "RankMe {:.1f}", "lidar": "LiDAR {:.1f}",
    "std": "std {:.2f}", "alignment": "alignment {:.2f}", "uniformity": "uniformity {:.2f}",
    "subset_knn_top1": "kNN of a part {:.1f} %", "probe_top1": "probe {:.1f} %",
}  # fmt: skip
CONTRAST = {
    "contrastive_accuracy": "contrastive accuracy {:.1%}", "positive_similarity": "positives {:.2f}",
    "negative_similarity": "negatives {:.2f}", "queue_filled": "queue {:.0%} full",
}  # fmt: skip


class Display:
    """Shows a run on a console, as one of the sinks of its metrics. One that is quiet shows nothing."""

    def __init__(
        self, console: Console, step: int, last_step: int, batch_size: int, hint: Callable[[Entry], str]
    ) -> None:
        """step: the one the run goes on from. hint: a line to say after an entry, or ""."""
        self._console, self._hint = console, hint
        self._pace = Pace(step, last_step)
        self._texts = _Texts(self._pace, batch_size)
        on_terminal = console.is_interactive and not console.quiet
        self._lines = None if on_terminal else _Lines(self.say, self._texts)
        self._bar = _Bar(console, self._texts) if on_terminal else None

    def status(self, text: str) -> None:
        """Say what is being done while no step is: until the next one is finished, or another text is set; "": nothing.

        The time until then says nothing of how fast the steps are.
        """
        self._pace.begin(text)
        if self._lines:
            self._lines.status(text)

    @contextlib.contextmanager
    def doing(self, text: str) -> Iterator[None]:
        """Say what is being done in here."""
        self.status(text)
        yield
        self.status("")

    @contextlib.contextmanager
    def aside(self, text: str) -> Iterator[None]:
        """Say what is being done in here, and leave the terminal to what shows its own progress."""
        with self.doing(text):
            if self._bar:
                self._bar.stop(transient=True)
                self.say(f"{self._texts.count(self._pace.step)}: {text}")
            yield
            if self._bar:
                self._bar.start()

    def step(self, step: int) -> None:
        """A step is finished (1 for the first); on a GPU: given to it."""
        if self._pace.status and self._lines:
            self._lines.status("")
        self._pace.finish(step)

    def say(self, text: str) -> None:
        """One line, above the others if they stay."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=not self._console.is_terminal)

    def note(self, text: str) -> None:
        """Say something that holds until the end. A signal handler may call it: it takes no lock."""
        if self._bar:
            self._pace.note = text
        elif not self._console.quiet:
            tell_at_once(text)

    def write(self, entry: Entry) -> None:
        self._texts.entry = entry
        if self._lines:
            self._lines.write()
        if hint := self._hint(entry):
            self.say(hint)

    def event(self, entry: Entry) -> None:
        said = (text.format(entry[name]) for name, text in EVENTS.items() if entry.get(name) is not None)
        self.say(f"step {entry['step']}: {', '.join(said)}")

    def close(self) -> None:
        self.status("")
        if self._bar:
            self._bar.stop(transient=False)


class _Texts:
    """How far a run is, and what was last measured, in words."""

    def __init__(self, pace: Pace, batch_size: int) -> None:
        self.pace, self.entry = pace, Entry()
        self._batch_size = batch_size

    def count(self, step: int) -> str:
        return f"step {step}/{self.pace.last_step}"

    def always(self, step: int) -> list[str]:
        """What a person always wants to see after a step, besides their count; the least important last."""
        left, loss = self.pace.seconds_left(step), self.entry.get("loss")
        rate = self.pace.steps_per_second * self._batch_size or self.entry.get("images_per_sec", 0.0)
        return [
            f"{'-:--:--' if left is None else clock(left)} left",
            f"{f'{rate:.{0 if rate >= 10 else 1}f}' if rate else '-'} images/s",
            f"loss {'-' if loss is None else f'{loss:.4f}'}",
        ]

    def as_fits(self) -> list[str]:
        """The rest, the most important first."""
        entry = self.entry
        if not entry:
            return []
        counts = {"skipped": "steps skipped", "replaced": "images replaced"}
        said = None, entry.get("loss")
        terms = {name: value for name, value in entry.items() if name not in (*FIGURES, "loss") and value not in said}
        if terms.get("queue_filled") == 1:  # from here on it says nothing
            del terms["queue_filled"]
        return [
            *(f"{entry[name]} {text}" for name, text in counts.items() if entry[name]),
            f"epoch {entry['epoch']}",
            f"lr {entry['lr']:.4g}",
            *(text.format(terms[name]) for name, text in CONTRAST.items() if name in terms),
            f"{100 * entry['data_wait']:.0f}% waiting for data",
            *(f"{entry[name]:.1f} {text}" for name, text in MEMORY.items() if name in entry),
            *(f"{name} {value:.4f}" for name, value in terms.items() if name not in CONTRAST),
        ]


class _Bar:
    """The two lines at the bottom of a terminal, drawn by a thread of their own."""

    def __init__(self, console: Console, texts: _Texts) -> None:
        self._console, self._texts = console, texts
        self.start()

    def start(self) -> None:
        self._live = Live(get_renderable=lambda: self, console=self._console, refresh_per_second=REFRESHES)
        self._live.start(refresh=True)

    def stop(self, transient: bool) -> None:
        """transient: leave nothing behind."""
        self._live.transient = transient
        self._live.stop()

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._first(options.max_width)
        yield self._second(options.max_width)

    def _first(self, width: int) -> Table:
        step, last_step = self._texts.pace.step, self._texts.pace.last_step
        texts = self._texts.always(step)
        count = self._texts.count(step).ljust(len(self._texts.count(last_step)))
        while True:  # on a very narrow terminal, without the last ones
            room = width - sum(GAP + len(text) for text in (count, *texts))
            if room >= LEAST_BAR or not texts:
                break
            texts.pop()
        bar = ProgressBar(last_step, step, width=max(1, min(room, MOST_BAR)))
        line = Table.grid(padding=(0, GAP))
        line.add_row(count, bar, *texts)
        return line

    def _second(self, width: int) -> Text:
        line = Text(self._texts.pace.activity(), "yellow", no_wrap=True, overflow="ellipsis")
        between = "; " if line else ""
        for text in self._texts.as_fits():
            if len(line) + len(between) + len(text) <= width:
                line.append(between + text, "dim")
                between = ", "
        return line


class _Lines:
    """Plain lines: figures every PLAIN_SECONDS, and what takes more than a MOMENT."""

    def __init__(self, say: Callable[[str], None], texts: _Texts) -> None:
        self._say, self._texts = say, texts
        self._timer: threading.Timer | None = None
        self._last = -PLAIN_SECONDS

    def status(self, text: str) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if text:
            line = f"{self._texts.count(self._texts.pace.step)}: {text}"
            self._timer = threading.Timer(MOMENT, self._say, [line])
            self._timer.daemon = True
            self._timer.start()

    def write(self) -> None:
        now, step = time.monotonic(), self._texts.entry["step"]
        if now - self._last >= PLAIN_SECONDS or step == self._texts.pace.last_step:
            self._last = now
            self._say(", ".join((self._texts.count(step), *self._texts.always(step), *self._texts.as_fits())))
