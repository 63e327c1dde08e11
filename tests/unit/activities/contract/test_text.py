from __future__ import annotations

import time

import pytest
from hypothesis import example, given

from activities.contract.errors import (
    LOG_TAIL_LINE_CHARS,
    LOG_TAIL_LINES,
    HostFaultError,
    fault_of,
)
from activities.contract.text import (
    MAX_MESSAGE_CHARS,
    UNPRINTABLE,
    one_line,
    printable_lines,
    readable,
)
from tests.support.hostile_text import hostile_bytes, hostile_text


def is_harmless(line: str) -> bool:
    """Whether a terminal shows it, on one line, as it stands there."""
    return all(c == "\t" or c.isprintable() for c in line) and len(line.splitlines()) <= 1


@given(hostile_bytes)
def test_whatever_the_bytes_a_line_is_only_shown(data: bytes) -> None:
    line = readable(data.decode(errors="replace"))
    assert is_harmless(line)
    assert readable(line) == line


@given(hostile_text)
def test_a_message_is_one_line(text: str) -> None:
    message = one_line(text)
    assert is_harmless(message)
    assert one_line(message) == message


@given(hostile_text)
def test_lines_stay_apart(text: str) -> None:
    shown = printable_lines(text)
    assert shown.count("\n") == text.count("\n")
    assert all(map(is_harmless, shown.split("\n")))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]52;c;ZXZpbA==\x07a", "a"),
        ("\x1b]0;title\x1b\\b", "b"),
        ("\x9d0;title\x9cb", "b"),
        ("\x9b31mred\x9b0m", "red"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1bPq#0;2\x1b\\c", "c"),
        ("\x9d0;title\x1b[31mred", "red"),
        ("abc\u202egpj.exe", f"abc{UNPRINTABLE}gpj.exe"),
        ("10 %\r20 %\r", "20 %"),
        ("naïve \u65e5\u672c", "naïve \u65e5\u672c"),
    ],
)
def test_what_is_left_of_a_line(text: str, shown: str) -> None:
    assert readable(text) == shown


def test_a_message_says_how_much_of_it_was_cut() -> None:
    cut = one_line("x" * (MAX_MESSAGE_CHARS + 7))
    assert cut == "x" * MAX_MESSAGE_CHARS + "… [7 more characters cut]"
    assert one_line("a\n\n  b\r\nc") == "a b c"


@pytest.mark.parametrize(
    "part",
    [
        "x",
        "\r",
        "\x1b",
        "\x1b[",
        "\x1b]",
        "\x1b[0",
        "\x1b]0;\x1b",
        "\x1bP",
        "\x9b;",
        "\x9d",
        "\x9b0\x9dx",
        "\x90\x1b",
        "\u202e",
        "\n",
    ],
    ids=ascii,
)
def test_time_is_by_length_alone(part: str) -> None:
    def seconds(size: int) -> float:
        text, began = part * (size // len(part)) + "\x1bA", time.monotonic()
        one_line(text)
        return time.monotonic() - began

    assert seconds(1_000_000) < 60  # squared, it would be hours


@given(hostile_text)
@example("\x1b]52;c;ZXZpbA==\x07")
def test_an_error_carries_only_text(text: str) -> None:
    error = HostFaultError(text, hint=text, log_tail=[text] * (LOG_TAIL_LINES + 1))
    error.log_tail = (text,) * (LOG_TAIL_LINES + 1)
    failure = fault_of(ValueError(text)).failure()
    for line in (error.message, str(error), error.hint, failure.message, *error.log_tail):
        assert is_harmless(line)
    assert len(error.log_tail) == LOG_TAIL_LINES
    assert all(len(line) <= LOG_TAIL_LINE_CHARS for line in error.log_tail)
