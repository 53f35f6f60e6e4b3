"""Files are whole or absent, and whatever lies in their place stays what it is."""

import os
from pathlib import Path

import pytest

from fasttrain.system.durable import NewFile, read_json, temporary_path, write_json


@pytest.mark.parametrize("name", ["a.json", ".a.json.tmp"])
def test_a_link_in_the_place_of_a_file_is_not_written_through(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("untouched")
    (tmp_path / name).symlink_to(elsewhere)
    write_json(tmp_path / "a.json", {"a": 1})
    assert elsewhere.read_text() == "untouched"
    assert not (tmp_path / "a.json").is_symlink()
    assert read_json(tmp_path / "a.json", follow=False) == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["a.json", "elsewhere"]


def test_a_left_over_with_a_second_name_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("untouched")
    os.link(tmp_path / "other", temporary_path(tmp_path / "a"))
    new = NewFile(tmp_path / "a")
    new.file.write(b"new")
    new.publish()
    assert (tmp_path / "other").read_text() == "untouched"
    assert (tmp_path / "a").read_text() == "new"


def test_json_that_is_a_link_nested_or_no_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.symlink_to(tmp_path / "b.json")
    (tmp_path / "b.json").write_text("{}")
    assert read_json(path) == {}
    with pytest.raises(OSError, match="symbolic link"):
        read_json(path, follow=False)
    (tmp_path / "b.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="too deeply nested"):
        read_json(path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "fifo")
