from __future__ import annotations

import pytest
from pydantic import ValidationError

from activities.microvm.microvm import kernel_arguments
from activities.process.settings import Settings


def test_an_operators_arguments_come_after_ours_and_before_what_must_hold() -> None:
    told = kernel_arguments(Settings(kernel_arguments=" mitigations=off loglevel=7 ")).split()
    assert told.index("loglevel=3") < told.index("mitigations=off") < told.index("loglevel=7")
    assert told.index("loglevel=7") < told.index("init=/.template/init")
    assert any(word.startswith("ip=") for word in told[told.index("loglevel=7") :])


def test_without_any_the_command_line_is_as_it_was() -> None:
    """It is part of what snapshots are known by."""
    told = kernel_arguments(Settings(kernel_arguments="", dns_server="9.9.9.9"))
    assert "  " not in told
    assert "loglevel=3 ip=169.254.0.21::169.254.0.22:255.255.255.252:" in told


@pytest.mark.parametrize("words", ["a\nb", "a\0b", "é", "a" * 1001])
def test_what_a_command_line_cannot_have_is_refused(words: str) -> None:
    with pytest.raises(ValidationError):
        Settings(kernel_arguments=words)
