"""docs/library.md can be followed: its programs run one after the other, on small images and in small batches."""

import os
import pathlib
import re
import subprocess
import sys

from support.commands import ROOT

PAGE = (ROOT / "docs/library.md").read_text(encoding="utf-8")
SMALLER = {"size=224": "size=16", "batch_size=256": "batch_size=24", 'arch="resnet18"': 'arch="small"'}


def test_the_page_s_programs_run(shards: pathlib.Path, image_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    for large, small in SMALLER.items():
        assert large in code
        code = code.replace(large, small)
    code += "print(features.shape, [crop.shape for crop in crops], loss.item() > 0, loader.epoch, again.epoch)\n"
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    (tmp_path / "shards").symlink_to(shards)
    (tmp_path / "photo.jpg").symlink_to(next((image_folder / "val").rglob("*.jpg")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    crops = ", ".join(["torch.Size([24, 3, 7, 7])"] * 6)
    assert done.stdout.splitlines()[-1] == f"torch.Size([1, 256]) [{crops}] True 0 2"
    assert (tmp_path / "runs/first/checkpoints").is_dir()


def test_the_page_names_all_doors() -> None:
    import fasttrain

    named = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(name for name in named if name in fasttrain.__all__) == sorted(fasttrain.__all__)
