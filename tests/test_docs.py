"""The documents can be read: no sentence is longer than a reader can hold, and every link leads somewhere."""

import pathlib
import re

import pytest
from support.commands import ROOT

MOST_WORDS = 40  # of a sentence
DOCS = sorted((ROOT / "docs").glob("*.md"))
READ_THROUGH = [*(path for path in DOCS if path.name != "log.md"), ROOT / "README.md"]  # the log is looked up, not read


def paragraphs(text: str) -> list[str]:
    """Paragraphs and points of lists, each on one line; without headings, tables and blocks of code."""
    found, fenced = [""], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if fenced or not line.strip() or line.startswith(("#", "|", "```", "    ")):
            found.append("")
        elif re.match(r"\s*([-*]|\d+\.) ", line):
            found.append(line.strip())
        else:
            found[-1] += " " + line.strip()
    return [paragraph for paragraph in found if paragraph]


def sentences(text: str) -> list[str]:
    """The sentences of its prose. A piece of code inside one counts as a word."""
    plain = (re.sub(r"`[^`]+`", "code", paragraph) for paragraph in paragraphs(text))
    return [sentence for paragraph in plain for sentence in re.split(r"(?<=[.!?])[)*_\"”]*\s+", paragraph)]


def too_long(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if len(re.findall(r"\w[\w'’.,-]*", sentence)) > MOST_WORDS]


@pytest.mark.parametrize("path", READ_THROUGH, ids=lambda path: path.name)
def test_every_sentence_can_be_held_in_mind(path: pathlib.Path) -> None:
    assert too_long(path.read_text(encoding="utf-8")) == []


def test_a_sentence_is_measured_over_its_lines_and_without_tables_and_code() -> None:
    words = " ".join(["word"] * MOST_WORDS)
    assert too_long(f"{words}.\n{words}.") == []
    assert len(too_long(f"- One more\n  {words}.")) == 1
    assert too_long(f"| {words} | {words} |\n\n    {words} {words}\n") == []


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md"], ids=lambda path: path.name)
def test_every_link_within_the_project_leads_to_a_file(path: pathlib.Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / pathlib.Path(link)).exists()] == []


ROOMS = ("fasttrain", "kernels", "dataprep", "benchmarks", "examples", "recipes", "tests")
FILES = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.*")]


@pytest.mark.parametrize("path", READ_THROUGH, ids=lambda path: path.name)
def test_every_file_named_exists(path: pathlib.Path) -> None:
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|sh|sbatch|yaml))`", path.read_text(encoding="utf-8")))
    assert sorted(n for n in named if not any(f"/{file}".endswith(f"/{n}") for file in FILES)) == []
