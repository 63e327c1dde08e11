from __future__ import annotations

import time

from activities.image.output_lines import CUT_LINE_CHARS, MAX_LINE_BYTES, OutputLines
from activities.step.build_log import MAX_LINE_CHARS


def test_lines_are_put_together_from_parts() -> None:
    lines = OutputLines()
    assert lines.add(b"one\r\ntw") == ["one"]
    assert lines.add(b"o\n\nthr\xc3") == ["two", ""]
    assert lines.add(b"\xa9e") == []
    assert lines.finish() == ["thr\u00e9e"]
    assert lines.finish() == []


def test_a_long_line_is_cut_and_says_how_much_is_missing() -> None:
    lines = OutputLines()
    assert lines.add(b"x" * MAX_LINE_BYTES + b"\n") == ["x" * MAX_LINE_BYTES]
    [cut, after] = lines.add(b"x" * (MAX_LINE_BYTES + 1) + b"\nafter\n")
    missing = MAX_LINE_BYTES + 1 - CUT_LINE_CHARS
    assert cut == "x" * CUT_LINE_CHARS + f"\u2026 [{missing} more bytes cut]"
    assert len(cut) <= MAX_LINE_CHARS
    assert after == "after"


def test_an_endless_line_takes_time_by_its_length_alone() -> None:
    lines, part, began = OutputLines(), b"x" * 16_384, time.monotonic()
    for _ in range(100_000_000 // len(part)):
        assert lines.add(part) == []
    assert time.monotonic() - began < 5
    [line] = lines.finish()
    assert "more bytes cut" in line
