"""The README tells the truth: every room is in its tree, every option it shows exists."""

import dataclasses
import re
from typing import get_type_hints

from support.commands import ROOT

from benchmarks.methods import MethodsBenchmark
from benchmarks.step import StepBenchmark
from fasttrain.config import make_config
from fasttrain.dataprep.convert import ConvertConfig
from fasttrain.dataprep.verify import VerifyConfig
from fasttrain.jobs.options import EmbedConfig, EvaluateConfig, ExportConfig, ReportConfig, RunsConfig
from fasttrain.methods import METHODS
from fasttrain.system.options import flat

README = (ROOT / "README.md").read_text()


def test_every_room_is_in_the_tree() -> None:
    files = [path for room in ("dataprep", "fasttrain", "kernels", "recipes") for path in (ROOT / room).rglob("*.py")]
    rooms = {path.parent.relative_to(ROOT).name for path in files}
    assert not [room for room in rooms if f" {room}/ " not in README]


def test_every_file_of_the_tree_exists() -> None:
    tree = README.split("## Where everything is")[1].split("## Working on it")[0]
    names = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    assert not [name for name in re.findall(r"[\w-]+\.(?:py|sh|md|txt|toml|yaml|sbatch)\b", tree) if name not in names]


# options of torchrun, sbatch and docker
FOREIGN = {"user", "nproc-per-node", "nodes", "gpus-per-node", "build"}


def names_of(options: type) -> set[str]:
    """Of a command's options, and of those in its groups."""
    hints = get_type_hints(options)
    groups = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    return (hints.keys() - groups.keys()).union(*(names_of(kind) for kind in groups.values()))


def test_every_option_shown_exists() -> None:
    known = {name.replace("_", "-") for method in METHODS for name in flat(make_config(method))}
    for command in (
        EmbedConfig,
        EvaluateConfig,
        ExportConfig,
        ReportConfig,
        RunsConfig,
        ConvertConfig,
        VerifyConfig,
        MethodsBenchmark,
        StepBenchmark,
    ):
        known |= {name.replace("_", "-") for name in names_of(command)}
    shown = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README)) - {"help"} - FOREIGN
    assert shown <= known
