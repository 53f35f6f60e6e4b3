"""Where compiled code and the like is kept between processes, for users without a home or a checkout they can write.

These caches hold machine code and pickles: what lies in them is run. So none is used that another user can write to.
"""

from __future__ import annotations

import os
import pathlib
import stat
import sys
import tempfile

_ROOMS = "kernels/augment", "formats", "dataprep"  # with code that numba compiles and, by itself, keeps beside it
_PROBE_BYTES = 1 << 16  # which a full disk or quota does not take
_MEMORY = pathlib.Path("/dev/shm")  # can be written in containers where nothing else can


def choose_caches() -> None:
    """Have numba, Triton, torch's compiler and matplotlib keep what they make where this user, and no other, can write.

    That is the first of: where a variable of the environment says, the usual place, a folder of this user's own in the
    temporary folder. Where none will do, NUMBA_CACHE_DIR is empty, and code is compiled anew in every process.
    """
    package = pathlib.Path(__file__).resolve().parents[1]
    home = pathlib.Path(os.path.expanduser("~"))  # "~" itself where there is none
    config, cache = (
        pathlib.Path(os.environ.get(name) or home / usual)
        for name, usual in (("XDG_CONFIG_HOME", ".config"), ("XDG_CACHE_HOME", ".cache"))
    )
    beside = [package / room / "__pycache__" for room in _ROOMS]
    triton = pathlib.Path(os.environ.get("TRITON_HOME") or home) / ".triton/cache"
    _choose("NUMBA_CACHE_DIR", beside, [cache])
    _choose("TRITON_CACHE_DIR", [triton])
    _choose("MPLCONFIGDIR", [config / "matplotlib", cache / "matplotlib"])
    _choose("TORCHINDUCTOR_CACHE_DIR")  # its usual place has a name in the temporary folder that anybody can take first
    _choose("XDG_CACHE_HOME", [cache])  # of fontconfig, which matplotlib asks, and which complains where it has none
    if "numba" in sys.modules:
        sys.modules["numba"].core.config.reload_config()


def _choose(variable: str, usual: list[pathlib.Path] | None = None, more: list[pathlib.Path] | None = None) -> None:
    """Leave a variable as it is where that will do, or unset for the usual places; else let it name a folder."""
    given = os.environ.pop(variable, "")
    if given and _usable(pathlib.Path(given).resolve(), make=True):
        os.environ[variable] = given
        return
    if given:
        _warn(f"{variable}={given} is passed over: this user can't write there, or others can")
    if usual and all(map(_usable, usual)):
        return
    temporary = (root / f"fasttrain-{os.geteuid()}" for root in (_temporary_folder(), _MEMORY))
    for folder in (*(more or ()), *temporary):
        if _usable(folder, make=True):
            os.environ[variable] = str(folder / variable.lower().removesuffix("_cache_dir"))
            return
    if variable == "NUMBA_CACHE_DIR":
        os.environ[variable] = ""
        _warn("no folder can be written for compiled code (HOME, TMPDIR): it is compiled anew in every process")


def _usable(folder: pathlib.Path, make: bool = False) -> bool:
    """Can this user write into it, or where it would be made, and can no other user?"""
    if not folder.is_absolute():  # no home is known
        return False
    try:
        if make:
            folder.mkdir(0o700, parents=True, exist_ok=True)
        while not os.path.lexists(folder):
            folder = folder.parent
        found, above = os.lstat(folder), os.stat(folder.parent)
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
        stays = above.st_mode & stat.S_ISVTX or not above.st_mode & 0o022  # else another could be put in its place
        if not (ours and stays):
            return False
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            return probe.write(bytes(_PROBE_BYTES)) == _PROBE_BYTES
    except OSError:
        return False


def _temporary_folder() -> pathlib.Path:
    try:
        return pathlib.Path(tempfile.gettempdir())
    except FileNotFoundError:  # none can be written
        return _MEMORY


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
