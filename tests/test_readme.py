"""The README tells the truth: every room is in its tree, every option it shows exists."""

import re

from support.commands import ROOT

README = (ROOT / "README.md").read_text()


def test_every_room_is_in_the_tree():
    files = [path for room in ("dataprep", "fasttrain", "kernels", "recipes") for path in (ROOT / room).rglob("*.py")]
    rooms = {path.parent.relative_to(ROOT).name for path in files}
    assert not [room for room in rooms if f" {room}/ " not in README]


def test_every_file_of_the_tree_exists():
    tree = README.split("## Where everything is")[1].split("## Working on it")[0]
    names = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    assert not [name for name in re.findall(r"[\w-]+\.(?:py|sh|md|txt|toml|yaml|sbatch)\b", tree) if name not in names]


# options of torchrun, sbatch and docker
FOREIGN = {"nproc-per-node", "nodes", "gpus-per-node", "build"}


def test_every_option_shown_exists():
    known = set()
    for path in ("fasttrain/config.py", "fasttrain/evaluate.py", "dataprep/convert.py", "dataprep/verify.py"):
        known |= {name.replace("_", "-") for name in re.findall(r"^    (\w+): ", (ROOT / path).read_text(), re.M)}
    shown = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README)) - {"help"} - FOREIGN
    assert shown <= known
