"""Every reader of files bears what seeds make of sound ones: a result, or an error about the data, soon and in little.

FASTTRAIN_FUZZ_CASES: how many files each reader gets, 100 without it. FASTTRAIN_FUZZ_FIRST: the number of the first.
"""

import os
import subprocess
import sys

import pytest
from support.commands import ROOT
from support.fuzz import PATIENCE_SECONDS, READERS

CASES, FIRST = (int(os.environ.get(f"FASTTRAIN_FUZZ_{name}", value)) for name, value in (("CASES", 100), ("FIRST", 0)))


@pytest.mark.timeout(2 * PATIENCE_SECONDS + CASES)
@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_end_in_a_result_or_an_error_about_the_data(reader: str) -> None:
    command = [sys.executable, "-m", "support.fuzz", reader, str(FIRST), str(CASES)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    last = (done.stdout.splitlines() or [reader])[-1]
    again = "PYTHONPATH=.:tests python -m support.fuzz"
    assert done.returncode == 0, f"status {done.returncode}; again: {again} {last} 1\n{done.stderr[-3000:]}"
    assert "Warning" not in done.stderr, "what a stranger's file holds is no news for a terminal"
    assert last == f"{reader} {FIRST + CASES - 1}"
