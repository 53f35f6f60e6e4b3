"""The README tells the truth: every file is in its tree, every option it shows exists."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_every_file_is_in_the_tree():
    files = [p for room in ("dataprep", "fasttrain", "kernels") for p in (ROOT / room).rglob("*.py")]
    files += [p for pattern in ("docs/*", "runs/*.*", "*.sh", "*.yaml", "*.txt", "*.toml") for p in ROOT.glob(pattern)]
    missing = [str(p.relative_to(ROOT)) for p in files if p.name != "__init__.py" and p.name not in README]
    assert not missing


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
