"""How commands end."""

import pytest

from fasttrain.system.cli import finish
from fasttrain.system.errors import UserError, note, printable
from fasttrain.system.signals import Stopped


def test_a_package_that_is_missing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        import a_package_that_nobody_has.part  # noqa: F401

        return 0

    assert finish(main) == 1
    assert "error: the package a_package_that_nobody_has is missing here" in capsys.readouterr().err


def test_what_a_stranger_named_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J\u202e\udc80 é.jpg"

    def main() -> int:
        raise UserError(f"{name}:\nno image")

    assert printable(name) == "a\\x1b[2J\\u202e\\udc80 é.jpg"
    assert finish(main) == 2
    assert capsys.readouterr().err.endswith(f"error: {printable(name)}: no image\n")
    note(name)
    assert capsys.readouterr().err == f"note: {printable(name)}\n"


def test_a_module_of_our_own_that_is_missing_is_a_defect_and_shows_where() -> None:
    def main() -> int:
        import fasttrain.no_such_module  # noqa: F401

        return 0

    with pytest.raises(ModuleNotFoundError, match=r"fasttrain\.no_such_module"):
        finish(main)


def test_what_a_signal_has_stopped_ends_with_its_status() -> None:
    def stopped() -> int:
        raise Stopped(15)

    assert finish(stopped) == 143
