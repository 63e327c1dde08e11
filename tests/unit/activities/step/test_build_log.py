from __future__ import annotations

from pathlib import Path

from activities.contract.names import Step
from activities.contract.status import LogLevel
from activities.step.build_log import MAX_LINE_CHARS, MAX_STEP_BYTES, BuildLog, read_entries


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "b.jsonl", Step.PULL)
    log.info("pulling", layer="1/3")
    log.error("naïve \ttab")
    first, second = read_entries(tmp_path / "b.jsonl")
    assert (first.level, first.message, first.fields) == (
        LogLevel.INFO,
        "pulling",
        {"layer": "1/3"},
    )
    assert (second.level, second.message, second.step) == (LogLevel.ERROR, "naïve \ttab", Step.PULL)
    assert log.tail() == ["pulling", "naïve \ttab"]


def test_a_secret_never_gets_in(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "b.jsonl", Step.PULL)
    log.redact("hunter2")
    log.info("login with hunter2 failed", detail="hunter2")
    text = (tmp_path / "b.jsonl").read_text()
    assert "hunter2" not in text
    assert "[secret]" in text


def test_control_characters_and_endless_lines_are_tamed(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "b.jsonl", Step.BOOT)
    log.info("\x1b[31mred\x07")
    log.info("x" * (MAX_LINE_CHARS + 5))
    red, long = read_entries(tmp_path / "b.jsonl")
    assert "\x1b" not in red.message
    assert long.message.endswith("… [5 more characters cut]")


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    BuildLog(path, Step.BOOT).info("whole")
    with path.open("a") as file:
        file.write('{"timestamp": "2026-')
    assert [entry.message for entry in read_entries(path)] == ["whole"]


def test_a_step_that_says_too_much_is_cut_short_but_for_its_end_and_its_errors(
    tmp_path: Path,
) -> None:
    path = tmp_path / "b.jsonl"
    log = BuildLog(path, Step.BOOT)
    for _ in range(MAX_STEP_BYTES // MAX_LINE_CHARS + 10):
        log.info("x" * MAX_LINE_CHARS)
    log.info("last words")
    log.error("why it failed")
    BuildLog(path, Step.UPLOAD).info("the next step")
    assert path.stat().st_size < MAX_STEP_BYTES + 4 * MAX_LINE_CHARS
    *_, cut, error, later = [entry.message for entry in read_entries(path)]
    assert cut == "this step has logged 8 MiB: the rest is left out"
    assert (error, later) == ("why it failed", "the next step")
    assert log.tail()[-2:] == ["last words", "why it failed"]
