from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from activities.contract.errors import GuestDiedError, StartCommandError
from activities.contract.names import Step
from activities.disk.data_dir import DataDir
from activities.microvm.console import MAX_LINE_BYTES, ConsoleReader, GuestReadiness
from activities.step.build_log import BuildLog, open_build_log

BUILD = "11111111-1111-4111-8111-111111111111"


@pytest_asyncio.fixture
async def log(tmp_path: Path) -> AsyncIterator[BuildLog]:
    async with open_build_log(DataDir(tmp_path), BUILD, Step.BOOT) as opened:
        yield opened


@pytest.fixture
def console(tmp_path: Path) -> Path:
    path = tmp_path / "console"
    path.write_bytes(b"")
    return path


def append(console: Path, data: bytes) -> None:
    with console.open("ab") as file:
        file.write(data)


def test_lines_come_whole_and_once(console: Path) -> None:
    reader = ConsoleReader(console)
    append(console, b"one\r\ntw")
    assert reader.lines() == ["one"]
    append(console, b"o\n\x1b[1;31mred\x1b[0m\n")
    assert reader.lines() == ["two", "red"]
    assert reader.lines() == []


def test_the_next_reader_goes_on_where_this_one_has_dealt_with(console: Path) -> None:
    reader = ConsoleReader(console)
    append(console, b"one\n")
    assert reader.lines() == ["one"]
    reader.remember()
    append(console, b"two\n")
    assert reader.lines() == ["two"]  # read, not remembered: its worker died here
    assert ConsoleReader(console).lines() == ["two"]


def test_a_line_without_an_end_is_taken_in_pieces(console: Path) -> None:
    append(console, b"x" * (MAX_LINE_BYTES + 1))
    assert ConsoleReader(console).lines() == ["x" * (MAX_LINE_BYTES + 1)]


def test_no_console_yet_is_no_line(tmp_path: Path) -> None:
    assert ConsoleReader(tmp_path / "console").lines() == []


async def test_ready(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    for line in ("@tm@ start added", "@tm@ ready-attempt 2 1", "@tm@ ready 3"):
        assert not guest.ready
        guest.hear(line)
    assert guest.ready
    assert guest.attempts == 2


async def test_the_start_commands_output_cannot_pose_as_ours(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ out @tm@ ready 1")
    assert not guest.ready


@pytest.mark.parametrize(("code", "meaning"), [("127", "not found"), ("126", "not executable")])
async def test_a_start_command_that_ends_badly(log: BuildLog, code: str, meaning: str) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ err no such file")
    guest.hear(f"@tm@ start-exit {code}")
    guest.hear("@tm@ failed the start command ended before the guest was ready")
    assert isinstance(guest.failure, StartCommandError)
    assert f"exit code {code} ({meaning})" in guest.failure.message
    assert guest.failure.log_tail == ("no such file",)


async def test_a_start_command_that_ends_well_is_fine(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ start-exit 0")
    assert guest.failure is None


async def test_a_timeout_tells_what_was_tried(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ ready-out connection refused")
    guest.hear("@tm@ ready-attempt 9 1")
    error = guest.timed_out(30)
    assert error.message == (
        "the guest was not ready within 30 s; the ready command was tried 9 times, "
        "the last ended with exit code 1"
    )
    assert error.log_tail == ("ready command: connection refused",)


async def test_a_panic_is_told_however_long_its_trace(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("[ 2.4] Kernel panic - not syncing: sysrq triggered crash")
    for number in range(100):
        guest.hear(f"[ 2.5]  function_{number}+0x1/0x2")
    error = guest.died("exit code 0")
    assert isinstance(error, GuestDiedError)
    assert "Kernel panic - not syncing" in error.message


async def test_unknown_words_of_ours_are_passed_over(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ from-a-later-version x")
    guest.hear("@tm@")
    assert guest.failure is None
