"""The report of a run whose files are not all as they should be."""

import json
import resource
from pathlib import Path

import pytest

from fasttrain.report import EVALUATION, write_report
from fasttrain.run.metrics import read_metrics


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record = {"config": {"method": "moco", "arch": "small", "data": "x"}, "environment": {"machine": "a machine"}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    return tmp_path


def test_half_an_evaluation_is_left_out_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / EVALUATION).write_text('{"step": 4, "knn_top1": 5')
    assert "kNN" not in write_report(run).read_text()
    assert f"warning: {run / EVALUATION} is damaged" in capsys.readouterr().err


def test_a_full_disk_leaves_the_report_as_it_was(run: Path) -> None:
    """A limit on file size stands for the full disk."""
    before = write_report(run).read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "report.html").read_text() == before
