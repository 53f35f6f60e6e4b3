"""Where compiled code is kept: any user can run, from a checkout and with a home that can't be written."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest
from support.commands import ROOT
from support.launch import TINY

from fasttrain.system import caches

VARIABLES = "NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"
STRANGER = 54321  # without an entry in /etc/passwd
ALL_COMMANDS = """
import sys
from fasttrain import evaluate, report, train
from fasttrain.dataprep import convert, verify

images, *tiny = sys.argv[1:]
assert convert.main([images, "shards", "--workers", "1", "--max-side", "24"]) == 0
assert verify.main(["shards"]) == 0
assert train.main(["--data", "shards", "--run", "run", "--max-steps", "2", *tiny]) == 0
assert evaluate.main(["run", "--knn"]) == 0
assert report.main(["run"]) == 0
"""


@pytest.fixture
def choose(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A machine of its own: no variables, no home, no /dev/shm; a temporary folder, in which the package lies."""
    for name in (*VARIABLES, "HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "TRITON_HOME"):
        monkeypatch.setenv(name, "")  # so that what is set now is undone in the end
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(caches, "_MEMORY", tmp_path / "none" / "file")
    (tmp_path / "none").touch()
    (tmp_path / "package/system").mkdir(parents=True)
    monkeypatch.setattr(caches, "__file__", str(tmp_path / "package/system/caches.py"))
    return tmp_path


def chosen() -> list[str | None]:
    caches.choose_caches()
    return [os.environ.get(name) for name in VARIABLES]


def test_without_a_home_or_a_checkout_to_write_all_is_kept_in_a_temporary_folder_of_this_user_alone(
    choose: pathlib.Path,
) -> None:
    (choose / "package").chmod(0o777)
    own = choose / f"fasttrain-{os.geteuid()}"
    assert chosen() == [str(own / name) for name in ("numba", "triton", "mplconfigdir", "torchinductor")]
    assert own.stat().st_mode & 0o777 == 0o700


def test_what_the_environment_says_comes_first_and_then_the_usual_place(
    choose: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: str(choose / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(choose / "mine"))
    assert chosen() == [None, None, None, str(choose / "mine")]
    assert not (choose / "home").exists()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_is_never_used(
    choose: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: int
) -> None:
    for name in ("given", f"fasttrain-{os.geteuid()}", "package"):
        (choose / name).mkdir(exist_ok=True)
        (choose / name).chmod(mode)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(choose / "given"))
    assert chosen() == ["", None, None, None]
    given, none = capsys.readouterr().err.splitlines()
    assert given.startswith(f"warning: NUMBA_CACHE_DIR={choose / 'given'} is passed over")
    assert "compiled anew in every process" in none


def test_a_link_that_another_user_may_have_laid_is_not_followed(choose: pathlib.Path) -> None:
    (choose / "package").chmod(0o777)
    (choose / "elsewhere").mkdir()
    (choose / f"fasttrain-{os.geteuid()}").symlink_to(choose / "elsewhere")
    assert chosen()[0] == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_used(choose: pathlib.Path) -> None:
    (choose / "package").chmod(0o777)
    (choose / "fasttrain-0").mkdir(0o700)
    os.chown(choose / "fasttrain-0", STRANGER, STRANGER)
    assert chosen()[0] == ""


def test_where_nothing_can_be_written_code_is_compiled_all_the_same(tmp_path: pathlib.Path) -> None:
    program = """
import tempfile
def refuse(*arguments, **options):
    raise OSError(30, "Read-only file system")
tempfile.TemporaryFile = refuse  # numba tries its places in the same way
import numpy, fasttrain
from fasttrain.dataprep.resize import resize_plane
assert (resize_plane(numpy.full((40, 30), 7, numpy.uint8), 8, 6) == 7).all()
"""
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**own, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiled anew in every process") == 1


def read_only(folder: pathlib.Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.mark.slow
def test_any_user_can_run_every_command_from_a_read_only_checkout_without_a_home(image_folder: pathlib.Path) -> None:
    """As root it is run as another user, who may read what root can: its Python."""
    checkout, work, temporary = (pathlib.Path(tempfile.mkdtemp()) for _ in range(3))
    for name in ("fasttrain", "kernels", "dataprep"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(image_folder, work / "images")
    read_only(checkout)
    words = [sys.executable, "-c", ALL_COMMANDS, "images", *TINY]
    if os.geteuid() == 0:
        reads = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
        words = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", *reads, *words]
        for path in (work, temporary):
            os.chown(path, STRANGER, STRANGER)
    own = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TMPDIR": str(temporary), "PYTHONPATH": str(checkout)}
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=work, env={**own, "OMP_NUM_THREADS": "1"})
        if "setpriv: " in done.stderr:
            pytest.skip(f"no other user can be taken here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        assert not set(checkout.rglob("__pycache__"))
        assert list((temporary / f"fasttrain-{STRANGER if os.geteuid() == 0 else os.geteuid()}/numba").iterdir())
        assert json.loads(done.stdout.splitlines()[-1])["report"] == "run/report.html"
    finally:
        for path in (checkout, work, temporary):
            subprocess.run(["chmod", "-R", "u+w", path], check=True)
            shutil.rmtree(path)
