"""What a person sees of a run: on terminals of 80 and 200 columns, and in plain lines."""

import io
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from rich.console import Console
from support.launch import train

from fasttrain import open_dataset
from fasttrain.run import display as module
from fasttrain.run.display import Display
from fasttrain.run.pace import Pace

WRITTEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r|\n)|([^\x1b\r\n]+)")
ENTRY = {
    "step": 123450, "epoch": 246, "loss": 5.12344, "info_nce": 5.02344, "cross": 0.2, "uniform": 0.1, "lr": 0.029984,
    "images_per_sec": 12800.0, "rss_gib": 3.14, "gpu_gib": 61.5, "replaced": 5, "data_wait": 0.02,
    "transfer_wait": 0.0, "views_time": 0.1, "skipped": 3,
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; `clock[0] += seconds` moves it."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm-256color")  # a dumb one gets plain lines
    return now


def terminal(width: int) -> Console:
    return Console(width=width, height=24, force_terminal=True, file=io.StringIO())


def plain(**options: Any) -> Console:
    return Console(width=80, force_terminal=False, file=io.StringIO(), **options)


def make(console: Console, step: int = 123440, last_step: int = 1000000, hint: str = "") -> Display:
    return Display(console, step, last_step, 256, lambda entry: hint)


def screen(display: Display) -> list[str]:
    """The lines that a terminal would show, as far as it knows what rich writes: colours, line up, erase line."""
    rows, row, column = [""], 0, 0
    for number, code, move, text in WRITTEN.findall(display._console.file.getvalue()):
        assert not code or code in "mhlAK"
        row -= int(number) if code == "A" else 0
        if code == "K":
            rows[row] = ""
        column = 0 if move == "\r" else column
        if move == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
        column += len(text)
    return "\n".join(line.rstrip() for line in rows).rstrip().splitlines()


def drawn(display: Display) -> list[str]:
    """The screen after the two lines were drawn once more."""
    display._bar._live.refresh()
    return screen(display)


def take_steps(
    display: Display, clock: list[float], steps: Iterable[int] = range(123441, 123451), seconds: float = 1 / 64
) -> None:
    for step in steps:
        clock[0] += seconds
        display.step(step)


@pytest.mark.parametrize("width", [80, 200])
def test_what_counts_is_on_one_line_and_as_much_of_the_rest_as_fits_on_another(clock: list[float], width: int) -> None:
    display = make(terminal(width))
    take_steps(display, clock)
    display.write(ENTRY)
    first, second = drawn(display)
    display.close()
    assert re.fullmatch(r"step 123450/1000000   [━╸╺]{8,60}  3:48:16 left  16384 images/s  loss 5.1234", first)
    assert len(first) <= width
    assert second.startswith("3 steps skipped, 5 images replaced, epoch 246, lr 0.02998, 2% waiting for data")
    assert len(second) <= width
    whole = second.endswith("3.1 GiB of memory, 61.5 GiB of the GPU's, info_nce 5.0234, cross 0.2000, uniform 0.1000")
    assert whole == (width == 200)


CONTRAST = {
    "contrastive_accuracy": 0.6312, "positive_similarity": 0.8249, "negative_similarity": -0.0131,
    "queue_filled": 0.366,
}  # fmt: skip


def test_how_a_contrast_does_is_on_the_line_until_its_queue_is_full(clock: list[float]) -> None:
    display = make(terminal(100))
    display.write({**ENTRY, **CONTRAST, "skipped": 0, "replaced": 0})
    filling = drawn(display)[-1]
    display.write({**ENTRY, **CONTRAST, "skipped": 0, "replaced": 0, "queue_filled": 1.0})
    full = drawn(display)[-1]
    display.write({**ENTRY, **dict.fromkeys(CONTRAST), "skipped": 0, "replaced": 0})
    skipped = drawn(display)[-1]
    display.close()
    place, told = "epoch 246, lr 0.02998", "contrastive accuracy 63.1%, positives 0.82, negatives -0.01"
    assert filling == f"{place}, {told}, queue 37% full"
    assert full == f"{place}, {told}, info_nce 5.0234"
    assert skipped.startswith(f"{place}, 2% waiting for data, ")


def test_plain_lines_have_what_a_contrast_tells_before_its_other_terms(clock: list[float]) -> None:
    display = make(plain(), 0, 40)
    display.write({**ENTRY, **CONTRAST, "step": 1, "contrast": ENTRY["loss"]})  # said once, as the loss
    display.close()
    (line,) = screen(display)
    assert "lr 0.02998, contrastive accuracy 63.1%, positives 0.82, negatives -0.01, queue 37% full, 2% waiting" in line
    assert line.endswith("info_nce 5.0234, cross 0.2000, uniform 0.1000")


def test_a_narrow_terminal_keeps_the_count_and_the_time_left(clock: list[float]) -> None:
    display = make(terminal(44))
    take_steps(display, clock)
    display.write(ENTRY)
    first, second = drawn(display)
    display.close()
    assert re.fullmatch(r"step 123450/1000000   [━╸╺]+  3:48:16 left", first)
    assert len(second) <= 44


def test_what_is_not_known_yet_has_its_place(clock: list[float]) -> None:
    display = make(terminal(80), 0, 100)
    display.status("making the first batch")
    clock[0] += 12
    first, second = drawn(display)
    display.close()
    assert re.fullmatch(r"step 0/100    ━+  -:--:-- left  - images/s  loss -", first)
    assert second == "making the first batch, 12 s"


def test_a_status_ends_with_the_next_step_and_a_slow_step_is_named(clock: list[float]) -> None:
    pace = Pace(0, 100)
    assert pace.activity() == ""
    pace.begin("compiling")
    clock[0] += 83
    assert pace.activity() == "compiling, 0:01:23"
    pace.finish(1)
    assert pace.activity() == ""
    clock[0] += 7
    assert pace.activity() == "step 2, 7 s"
    pace.note = "stopping after this step"
    assert pace.activity() == "stopping after this step; step 2, 7 s"


def test_the_rate_leaves_out_what_is_no_training(clock: list[float]) -> None:
    """The first step, which compiles, and the seconds between two steps in which a checkpoint is saved."""
    pace = Pace(10, 100)
    pace.begin("compiling")
    clock[0] += 60
    pace.finish(11)
    assert pace.seconds_left(11) is None
    for step in range(12, 51):
        clock[0] += 0.25
        pace.begin("saving")
        clock[0] += 5
        pace.begin("")
        clock[0] += 0.25
        pace.finish(step)
    assert pace.steps_per_second == pytest.approx(2)
    assert pace.seconds_left(50) == pytest.approx(25)


def test_the_rate_is_that_of_late(clock: list[float]) -> None:
    pace = Pace(0, 10000)
    for step in range(1, 1001):
        clock[0] += 10.0 if step < 500 else 1.0
        pace.finish(step)
    assert pace.steps_per_second == pytest.approx(1)


def test_lines_are_said_above_those_that_stay(clock: list[float]) -> None:
    display = make(terminal(80), hint="a hint about [workers]")
    display.write(ENTRY)
    display.event({"step": 7, "epoch": 1, "knn_top1": 78.254, "alpha_req": 1.0, "histogram_positive": [1]})
    said, event, first, second = drawn(display)
    display.close()
    assert (said, event) == ("a hint about [workers]", "step 7: kNN 78.25 %")
    assert first.startswith("step 123440/1000000")
    assert second.startswith("3 steps skipped")


def test_a_display_that_stands_aside_leaves_the_terminal_alone(clock: list[float]) -> None:
    display = make(terminal(80), 0, 100)
    with display.aside("evaluating"):
        assert screen(display) == ["step 0/100: evaluating"]
        written = display._console.file.tell()
        clock[0] += 60
        assert drawn(display) == ["step 0/100: evaluating"]
        assert display._console.file.tell() == written
    assert [line[:12] for line in drawn(display)] == ["step 0/100: ", "step 0/100  "]
    display.close()


def test_plain_lines_come_now_and_then_and_at_the_end(clock: list[float]) -> None:
    display = make(plain(), 0, 40)
    for step in range(1, 41):
        clock[0] += 1.0
        display.step(step)
        display.write({**ENTRY, "step": step})
    display.close()
    assert [line.split(",")[0] for line in screen(display)] == [f"step {n}/40" for n in (1, 11, 21, 31, 40)]
    assert screen(display)[1].startswith("step 11/40, 0:00:29 left, 256 images/s, loss 5.1234, 3 steps skipped, ")


def test_plain_lines_say_once_what_takes_more_than_a_moment(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, running = [], []

    class Timer:
        def __init__(self, seconds: float, tell: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            assert seconds == module.MOMENT
            self.run = lambda: tell(*arguments)

        def start(self) -> None:
            started.append(self)
            running.append(self)

        def cancel(self) -> None:
            running.remove(self)

    monkeypatch.setattr("threading.Timer", Timer)
    display = make(plain(), 0, 40)
    display.status("making the first batch")
    running[0].run()
    display.status("compiling")
    assert running == [started[1]]
    display.step(1)
    assert running == []
    with display.doing("saving"):
        assert len(running) == 1
    assert running == []
    display.close()
    assert screen(display) == ["step 0/40: making the first batch"]


@pytest.mark.parametrize("console", [plain(quiet=True), Console(force_terminal=True, quiet=True, file=io.StringIO())])
def test_a_quiet_one_shows_nothing_and_leaves_stderr_to_others(
    clock: list[float], console: Console, capfd: pytest.CaptureFixture[str]
) -> None:
    stderr = sys.stderr
    display = make(console, 0, 1, hint="a hint")
    assert sys.stderr is stderr
    display.note("stopping")
    display.step(1)
    display.write({**ENTRY, "step": 1})
    display.close()
    assert console.file.getvalue() == ""
    assert capfd.readouterr().err == ""


def test_a_note_stays_until_the_end_and_is_a_line_where_nothing_stays(
    clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    display = make(terminal(80), 0, 100)
    display.note("stopping after this step")
    assert drawn(display)[1] == "stopping after this step"
    display.close()
    assert capfd.readouterr().err == ""
    display = make(plain(), 0, 100)
    display.note("stopping after this step")
    display.close()
    assert capfd.readouterr().err == "stopping after this step\n"


@pytest.mark.parametrize("keys", [20, 100])
def test_a_queue_of_more_keys_than_images_is_told(
    keys: int, shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = open_dataset(str(shards), "train").num_samples
    assert 20 < images < 100
    assert train(shards, tmp_path / "run", "--max-steps", 1, "--queue-size", keys) == 0
    told = f"--queue-size {keys} is more than the {images} images: each is in it several times"
    assert (told in " ".join(capsys.readouterr().err.split())) == (keys == 100)
