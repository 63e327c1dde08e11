"""What is told when standard output or error is closed, full, or read by nobody."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

PROGRAM = shlex.join([sys.executable, "-m", "api.cli.main"])
FULL = "error: cannot write to standard output: No space left on device\n"
CLOSED = "error: cannot write to standard output: Bad file descriptor\n"


def in_shell(script: str) -> tuple[str, str]:
    """Run a line of bash, in which $T is the command line; returns all that it wrote."""
    told = subprocess.run(
        ["bash", "-c", script.replace("$T", PROGRAM)], capture_output=True, text=True, check=True
    )
    return told.stdout, told.stderr


@pytest.mark.parametrize("command", ["--help", "--version", "token ci", "token ci --json"])
def test_output_that_has_no_room_is_told_in_a_line(command: str) -> None:
    assert in_shell(f"$T {command} >/dev/full; echo $?") == ("3\n", FULL)


@pytest.mark.parametrize("command", ["--help", "token ci"])
def test_a_closed_output_is_told_in_a_line(command: str) -> None:
    assert in_shell(f"$T {command} >&-; echo $?") == ("3\n", CLOSED)


def test_a_closed_output_that_is_not_used_does_no_harm() -> None:
    code, told = in_shell("$T nope >&-; echo $?")
    assert code == "2\n"
    assert "No such command 'nope'" in told


@pytest.mark.parametrize("errors", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(("command", "code"), [("nope", 2), ("status a --api-address [::1]:1", 3)])
def test_errors_that_nobody_can_be_told_leave_the_exit_code(
    command: str, code: int, errors: str
) -> None:
    assert in_shell(f"$T {command} {errors}; echo $?") == (f"{code}\n", "")


def test_output_goes_on_where_errors_are_closed() -> None:
    told, _ = in_shell("$T --version 2>&-; echo $?")
    assert told.startswith("template-manager ")
    assert told.endswith("\n0\n")


@pytest.mark.parametrize("command", ["--help", "token ci", "token ci --json"])
def test_nobody_reading_any_more_is_no_failed_build(command: str) -> None:
    assert in_shell(f"(sleep 0.2; $T {command}) | true; echo ${{PIPESTATUS[0]}}") == ("141\n", "")
