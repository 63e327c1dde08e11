"""What is told of what a step's guest says, when the step has secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from activities.contract.names import Step
from activities.microvm.console import MAX_LINE_BYTES
from activities.microvm.step_vm import StepTalk
from activities.step.build_log import BuildLog

SECRET = "hunter2-of-npm"


@pytest.fixture
def talk(tmp_path: Path) -> StepTalk:
    log = BuildLog(tmp_path / "b.jsonl", Step.ROOTFS)
    log.redact(SECRET)
    log.info("begun")
    return StepTalk(log, "RUN")


def told(talk: StepTalk) -> str:
    parts = [talk.log.path.read_text(), *talk.tail, talk.refused, talk.last_words]
    return "\n".join([*parts, *talk.facts.values()])


@pytest.mark.parametrize(
    "lines",
    [
        [f"@tm@ out the token is {SECRET}"],
        ["@tm@ err-part the token is hunt", "@tm@ err-part er2-o", "@tm@ err f-npm, again"],
        [f"@tm@ out-part {SECRET}", "@tm@ exit 1"],
        [f"@tm@ refused because of {SECRET}"],
        [f"@tm@ fact init {SECRET}"],
        [f"Kernel panic - not syncing: {SECRET}"],
        [f"@tm@ out \x1b[31m{SECRET[:5]}\x1b[0m{SECRET[5:]}"],
    ],
)
def test_a_secret_is_never_told(talk: StepTalk, lines: list[str]) -> None:
    for line in lines:
        talk.hear(line)
    assert SECRET not in told(talk)
    assert "[secret]" in told(talk)


@pytest.mark.parametrize("shown", range(5, len(SECRET)))
def test_nor_is_a_piece_of_it_where_output_is_cut(talk: StepTalk, shown: int) -> None:
    talk.hear(f"@tm@ out-part {SECRET[:shown]}")
    talk.hear("@tm@ cut ")
    talk.hear(f"@tm@ out {SECRET[-shown:]} and the end")
    assert SECRET[:shown] not in told(talk)
    assert SECRET[-shown:] not in told(talk)
    assert "and the end" in told(talk)


def test_nor_is_a_piece_of_it_at_the_end_of_what_is_kept_of_a_line(talk: StepTalk) -> None:
    count = MAX_LINE_BYTES // len(SECRET)
    rest = MAX_LINE_BYTES - count * len(SECRET)
    assert rest >= 4
    talk.hear(f"@tm@ out {SECRET * (count + 2)}")
    assert SECRET[:rest] not in told(talk)
