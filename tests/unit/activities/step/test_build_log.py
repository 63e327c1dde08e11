from __future__ import annotations

from pathlib import Path

from activities.contract.names import Step
from activities.contract.status import LogLevel
from activities.contract.units import MIB
from activities.process.settings import Settings
from activities.step.build_log import BuildLog, LogLimits, read_entries


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
    log.info("x" * (log.limits.line_chars + 5))
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
    limits = LogLimits.of(Settings(max_step_log_mb=2, max_log_line_chars=1000))
    log = BuildLog(path, Step.BOOT, limits=limits)
    for _ in range(2 * MIB // 1000 + 10):
        log.info("x" * 1000)
    log.info("last words")
    log.error("why it failed")
    BuildLog(path, Step.UPLOAD).info("the next step")
    assert path.stat().st_size < 2 * MIB + 4 * 1000
    *_, cut, error, later = [entry.message for entry in read_entries(path)]
    assert cut == "this step has logged 2 MiB: the rest is left out"
    assert (error, later) == ("why it failed", "the next step")
    assert log.tail()[-2:] == ["last words", "why it failed"]


def test_a_log_has_the_settings_limits_where_nobody_says_others(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "b.jsonl", Step.BOOT)
    assert log.limits == LogLimits.of(Settings())
    short = LogLimits.of(Settings(max_log_line_chars=256))
    BuildLog(log.path, Step.BOOT, limits=short).info("x" * 300)
    assert read_entries(log.path)[0].message == "x" * 256 + "… [44 more characters cut]"
