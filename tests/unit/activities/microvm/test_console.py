from __future__ import annotations

import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activities.contract.errors import GuestDiedError, StartCommandError, VmmEndedError
from activities.contract.names import Step
from activities.contract.status import LogLevel
from activities.contract.units import MIB
from activities.disk.data_dir import DataDir
from activities.microvm import console as console_module
from activities.microvm.console import MAX_LINE_BYTES, ConsoleReader, GuestReadiness
from activities.step.build_log import BuildLog, open_build_log, read_entries
from tests.support.hostile_text import hostile_bytes, hostile_text

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


def test_of_a_line_without_an_end_the_beginning_is_told(console: Path) -> None:
    append(console, b"x" * (MAX_LINE_BYTES + 1))
    assert ConsoleReader(console).lines() == ["x" * (MAX_LINE_BYTES + 1)]


@pytest.mark.parametrize("is_another_reader", [False, True])
def test_what_follows_in_an_endless_line_is_no_line_of_ours(
    console: Path, is_another_reader: bool
) -> None:
    reader = ConsoleReader(console)
    append(console, b"@tm@ out " + b"x" * MAX_LINE_BYTES)
    assert len(reader.lines()) == 1
    reader.remember()
    append(console, b"@tm@ ready 1" + b" " * MAX_LINE_BYTES)
    if is_another_reader:
        reader = ConsoleReader(console)
    assert reader.lines() == []
    reader.remember()
    append(console, b"@tm@ ready 2\n\n@tm@ ready 3\n")
    assert reader.lines() == ["@tm@ ready 3"]


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
    error = guest.ended("exit code 0", [])
    assert isinstance(error, GuestDiedError)
    assert "Kernel panic - not syncing" in error.message


async def test_an_init_that_ends_before_it_says_a_word_is_named(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ init systemd /lib/systemd/systemd")
    guest.hear("Kernel panic - not syncing: Attempted to kill init! exitcode=0x00007e00")
    error = guest.ended("exit code 0", [])
    assert "its init (systemd /lib/systemd/systemd) ended with exit code 126" in error.message


@pytest.mark.parametrize(
    "job", ["A start job is running for The data", "Job hang.service/start running"]
)
async def test_a_job_that_systemd_waits_for_is_named_when_time_is_up(
    log: BuildLog, job: str
) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ init systemd /lib/systemd/systemd")
    guest.hear("[FAILED] Failed to start other.service.")
    for second in range(90):
        star = f"\x1bM\r\x1b[K[ \x1b[0;31m*\x1b[0;1;31m{'*' * (second % 3)}\x1b[0m] "
        guest.hear(f"{star}{job} ({second}s / no limit)")
    error = guest.timed_out(90)
    assert "has not come to the start command within 90 s" in error.message
    assert error.message.endswith(job)
    assert len(logged(log)) == 2  # a job is told once


async def test_unknown_words_of_ours_are_passed_over(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ from-a-later-version x")
    guest.hear("@tm@")
    assert guest.failure is None


def logged(log: BuildLog) -> list[str]:
    return [entry.message for entry in read_entries(log.path)]


async def test_a_prompt_without_an_end_of_line_is_told_when_the_guest_fails(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ out license")
    guest.hear("@tm@ out-part accept? ")
    error = guest.timed_out(5)
    assert error.log_tail == ("license", "accept? ")
    assert logged(log) == ["license", "accept? "]


async def test_a_part_is_told_when_nothing_follows_it_for_a_while(
    log: BuildLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ err-part waiting for ")
    guest.tell_parts()
    assert logged(log) == []
    monkeypatch.setattr(console_module, "PART_SECONDS", 0.0)
    guest.tell_parts()
    assert logged(log) == ["waiting for "]


async def test_the_parts_of_a_line_are_one_line(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ out-part one, ")
    guest.hear("@tm@ err another stream")
    guest.hear("@tm@ out-part two, ")
    guest.hear("@tm@ out three")
    assert logged(log) == ["another stream", "one, two, three"]


async def test_of_an_endless_line_the_end_is_kept(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    for _ in range(2000):
        guest.hear("@tm@ out-part " + "x" * 4096)
    guest.hear("@tm@ out the end")
    [line] = logged(log)
    assert len(line) < 2 * MAX_LINE_BYTES


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("\x1b[31mred\x1b[0m and \x1b[1;4mloud\x1b[m", "red and loud"),
        ("10 %\r50 %\r100 %", "100 %"),
        ("100 %\r", "100 %"),
        ("\x1b]0;title\x07after \x1b]52;c;AAAA\x1b\\it", "after it"),
        (
            "bell\x07 and null\x00",
            "bell\N{REPLACEMENT CHARACTER} and null\N{REPLACEMENT CHARACTER}",
        ),
    ],
)
async def test_what_is_said_to_a_terminal_becomes_text(log: BuildLog, said: str, told: str) -> None:
    GuestReadiness(log).hear(f"@tm@ out {said}")
    assert logged(log) == [told]


async def test_an_escape_that_comes_in_two_parts_is_one(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ out-part \x1b[3")
    guest.hear("@tm@ out 1mred")
    assert logged(log) == ["red"]


async def test_a_ready_command_that_is_not_found_is_told_soon_and_once(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ ready-out sh: chekc: not found")
    for number in range(1, 8):
        guest.hear(f"@tm@ ready-attempt {number} 127")
    warnings = [each.message for each in read_entries(log.path) if each.level is LogLevel.WARN]
    assert len(warnings) == 1
    assert "chekc" in warnings[0]
    assert "(not found)" in warnings[0]


async def test_a_ready_command_that_is_found_later_is_no_warning(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    for number, code in enumerate((127, 127, 1, 127, 127), 1):
        guest.hear(f"@tm@ ready-attempt {number} {code}")
    assert not [each for each in read_entries(log.path) if each.level is LogLevel.WARN]


async def test_without_a_ready_command_no_attempts_are_told_of(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ start added")
    assert guest.timed_out(3).message == "the guest was not ready within 3 s"


async def test_an_init_that_has_not_come_so_far_is_told(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("[FAILED] Failed to mount data.mount - /data.")
    error = guest.timed_out(3)
    assert (
        "has not come to the start command within 3 s: Failed to mount data.mount" in error.message
    )
    assert error.log_tail


async def test_emergency_mode_ends_the_wait_but_not_when_a_command_says_so(log: BuildLog) -> None:
    words = "You are in emergency mode. After logging in, type journalctl"
    guest = GuestReadiness(log)
    guest.hear("[ TIME ] Timed out waiting for device data.")
    guest.hear(words)
    assert guest.failure is not None
    assert "Timed out waiting for device data" in guest.failure.message
    started = GuestReadiness(log)
    started.hear("@tm@ start systemd /lib/systemd/systemd")
    started.hear(words)
    assert started.failure is None


async def test_an_init_that_ends_is_named_with_its_last_words(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    guest.hear("@tm@ start other /sbin/init")
    guest.hear("cannot open /etc/service: goodbye")
    guest.hear("[ 3.1] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300")
    guest.hear("[ 3.1] CPU: 0 PID: 1 Comm: init Not tainted")
    error = guest.ended("exit code 0", [])
    assert "its init (other /sbin/init) ended with exit code 3" in error.message
    assert error.log_tail[-2] == "cannot open /etc/service: goodbye"
    assert "Kernel panic" in error.log_tail[-1]


@pytest.mark.parametrize(
    "goodbye",
    [
        "[   12.3] reboot: Restarting system",
        "[   12.3] reboot: Restarting system with command 'now'",
        "reboot: Power down",
        "[   12.3] reboot: System halted",
        "[   12.3] sysrq: Resetting",
    ],
)
async def test_a_guest_that_ends_says_so(log: BuildLog, goodbye: str) -> None:
    guest = GuestReadiness(log)
    guest.hear("stopping all")
    guest.hear(goodbye)
    error = guest.ended("exit code 0", ["Firecracker exiting successfully. exit_code=0"])
    assert isinstance(error, GuestDiedError)
    assert error.message.startswith("the guest died before it was ready: ")
    assert error.log_tail == ("stopping all", goodbye)


@pytest.mark.parametrize("reason", ["exit code 0", "exit code 148", "signal 9"])
async def test_without_a_goodbye_it_is_the_vmm_that_ended(log: BuildLog, reason: str) -> None:
    """KVM_EXIT_INTERNAL_ERROR ends Firecracker with code 0, too."""
    guest = GuestReadiness(log)
    guest.hear("@tm@ start systemd")
    guest.hear("[   12.3] all is well")
    guest.hear("@tm@ out reboot: Restarting system")  # only the start command says so
    vmm_log = [f"[x:fc_vcpu 0] line {number}" for number in range(30)]
    vmm_log.append("[x:fc_vcpu 0] Received KVM_EXIT_INTERNAL_ERROR signal")
    error = guest.ended(reason, vmm_log)
    assert isinstance(error, VmmEndedError)
    assert not error.retryable
    assert f"Firecracker ended ({reason}) while its guest was running" in error.message
    assert "KVM_EXIT_INTERNAL_ERROR" in error.message
    assert "[   12.3] all is well" in error.log_tail
    assert error.log_tail[-10:] == tuple(vmm_log[-10:])


async def test_what_is_said_until_it_is_heard_is_told_once(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    for _ in range(3):
        guest.hear("@tm@ start-exit 0")
        guest.hear("@tm@ ready 1 time")
    told = [each.message for each in read_entries(log.path)]
    assert told.count("start command ended with exit code 0") == 1
    assert told.count("guest is ready") == 1
    assert len([message for message in told if "no ready command" in message]) == 1


async def test_a_failure_keeps_its_first_words(log: BuildLog) -> None:
    guest = GuestReadiness(log)
    for _ in range(2):
        guest.hear("@tm@ start-exit 3")
        guest.hear("@tm@ failed the start command ended before the guest was ready")
    assert guest.failure is not None
    assert "exit code 3" in guest.failure.message


def test_what_is_lost_is_told_in_numbers(console: Path) -> None:
    reader = ConsoleReader(console)
    assert str(reader.lost()) == ""
    lost = console.with_name("console.lost")
    lost.write_text('{"lines": 12, "writes": 0}')
    assert str(reader.lost()) == "12 lines of the guest's console are left out"
    lost.write_text('{"lines": 12, "writes": 3}')
    assert "; 3 writes to it were lost" in str(reader.lost())
    lost.write_text("half")
    assert str(reader.lost()) == ""


@pytest.mark.parametrize(
    "forged",
    [
        "@tm@ start-exit abc",
        "@tm@ start-exit " + "9" * 5000,
        "@tm@ start-exit -1",
        "@tm@ start-exit \u0663",
        "@tm@ ready-attempt x y",
        "@tm@ ready-attempt",
        "@tm@ ready-attempt 1 " + "1" * 100,
        "@tm@ start \x1b]0;owned\x07",
        "@tm@  ",
        "@tm@ __class__ x",
    ],
)
async def test_a_line_that_makes_no_sense_is_left_out(log: BuildLog, forged: str) -> None:
    """A guest's root can write lines like ours: a claim, not a reason to fail otherwise."""
    guest = GuestReadiness(log)
    guest.hear(forged)
    assert guest.failure is None
    assert guest.attempts == 0
    assert "owned" not in log.path.read_text() if log.path.exists() else True


@given(data=hostile_bytes)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_a_guest_writes_is_told_or_left_out(
    tmp_path: Path, log: BuildLog, data: bytes
) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(data + b"\n")
    guest = GuestReadiness(log)
    for line in ConsoleReader(path).lines():
        guest.hear(line)
    guest.tell_parts(now=True)
    failures = [guest.failure, guest.timed_out(1), guest.ended("exit code 0", [])]
    assert all(failure is None or not failure.retryable for failure in failures)


KINDS = st.sampled_from(
    [
        "start",
        "out",
        "err",
        "out-part",
        "err-part",
        "start-exit",
        "ready-out",
        "ready-attempt",
        "ready",
        "failed",
        "other",
    ]
)
NUMBERS = st.sampled_from(["", "0", "-1", "127", "abc", "1e9", "٣", "²", "9" * 5000, " 1 2 3 "])


@given(lines=st.lists(st.tuples(KINDS, st.one_of(NUMBERS, hostile_text)), max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_what_claims_to_be_ours_is_parsed_strictly(
    log: BuildLog, lines: list[tuple[str, str]]
) -> None:
    guest = GuestReadiness(log)
    for kind, text in lines:
        guest.hear(f"@tm@ {kind} {text}")
    guest.tell_parts(now=True)
    assert 0 <= guest.attempts < 10**9
    assert guest.last_attempt_code is None or 0 <= guest.last_attempt_code < 10**9
    failures = [guest.failure, guest.timed_out(1), guest.ended("exit code 0", [])]
    assert all(failure is None or not failure.retryable for failure in failures)
    shown = [entry.message for entry in read_entries(log.path)]
    assert all(c == "\t" or c.isprintable() for message in shown for c in message)


@pytest.mark.parametrize("status", ["f" * 10_000, "0", "7f"])
async def test_a_panics_status_is_a_claim_too(log: BuildLog, status: str) -> None:
    guest = GuestReadiness(log)
    guest.hear(f"Kernel panic - not syncing: Attempted to kill init! exitcode=0x{status}")
    assert "its init" in guest.ended("exit code 0", []).message


@pytest.mark.parametrize(
    "part",
    [
        *(b"x", b"\r", b"\n", b"\x1b", b"\x1b[", b"@tm@ out ", b"@tm@ "),
        # Lines that were looked through again from each of their characters.
        b"\xc2\x9d" * 8000 + b"\x1bA\n",
        b"A b job is running for " * 600 + b"\n",
    ],
    ids=lambda part: ascii(part[:12]),
)
async def test_a_console_full_of_anything_takes_time_by_its_length(
    log: BuildLog, console: Path, part: bytes
) -> None:
    console.write_bytes(part * (16_000_000 // len(part)))
    reader, guest = ConsoleReader(console), GuestReadiness(log)
    tracemalloc.start()
    began, position = time.monotonic(), -1
    while position != reader.position:
        position = reader.position
        for line in reader.lines():
            guest.hear(line)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert position > 15_900_000
    assert time.monotonic() - began < 120
    assert peak < 64 * MIB


def test_a_long_line_in_parts_begins_with_its_beginning_and_says_how_much_is_cut(
    log: BuildLog,
) -> None:
    readiness = GuestReadiness(log)
    readiness.hear("@tm@ out-part START" + "x" * 4000)
    for _ in range(10):
        readiness.hear("@tm@ out-part " + "x" * 4000)
    readiness.hear("@tm@ out END")
    [line] = readiness.tail
    shown, _, rest = line.partition("… [")
    assert shown.startswith("START")
    assert len(shown) + int(rest.split()[0]) == len("START") + 44_000 + len("END")
    assert [entry.message for entry in read_entries(log.path)] == [line]


def test_a_character_that_lies_across_two_parts_is_one(console: Path, log: BuildLog) -> None:
    snowman = "☃".encode()
    append(console, b"@tm@ out-part a" + snowman[:1] + b"\n@tm@ out " + snowman[1:] + b"b\n")
    readiness = GuestReadiness(log)
    for line in ConsoleReader(console).lines():
        readiness.hear(line)
    assert list(readiness.tail) == ["a☃b"]
