from __future__ import annotations

import contextlib

import pytest

from activities.contract.checkpoints import SnapshotFacts
from activities.contract.errors import SnapshotNotResumableError
from activities.microvm.clock import ClockReading
from activities.microvm.microvm import Resumed, require_right_clock

EXACT = 1.0


def judge(
    before: ClockReading | None,
    after: ClockReading | None,
    load_ms: float = 50,
    *,
    clock_set: bool = True,
) -> None:
    skew, error = (before.skew_ms, before.error_ms) if before else (None, 0)
    facts = SnapshotFacts(clock_skew_ms=skew, clock_error_ms=error)
    require_right_clock(Resumed(load_ms, load_ms + 10, clock_set), after, facts)


@pytest.mark.parametrize("late_ms", [0, -1100, -3_600_000, 5000])
def test_a_guest_that_was_off_before_its_snapshot_is_not_blamed(late_ms: float) -> None:
    judge(ClockReading(late_ms, EXACT), ClockReading(late_ms - 20, EXACT))


@pytest.mark.parametrize("late_ms", [0, -1100, 5000])
def test_a_clock_that_stood_still_is_refused_wherever_it_stood(late_ms: float) -> None:
    with pytest.raises(SnapshotNotResumableError, match=r"clock is -1\.1 s off although"):
        judge(ClockReading(late_ms, EXACT), ClockReading(late_ms - 1100, EXACT))


@pytest.mark.parametrize(
    ("before_error_ms", "after_error_ms", "load_ms", "is_refused"),
    [
        (900, EXACT, 50, False),
        (EXACT, 900, 50, False),
        (EXACT, EXACT, 900, False),
        (1, 1, 50, True),
    ],
)
def test_a_busy_host_that_reads_or_loads_slowly_is_no_fault_of_the_snapshot(
    before_error_ms: float, after_error_ms: float, load_ms: float, is_refused: bool
) -> None:
    with pytest.raises(SnapshotNotResumableError) if is_refused else contextlib.nullcontext():
        judge(ClockReading(0, before_error_ms), ClockReading(-1100, after_error_ms), load_ms)


def test_who_was_not_told_to_move_the_clock_or_does_not_tell_it_is_not_blamed() -> None:
    off = ClockReading(-60_000, EXACT)
    judge(ClockReading(0, EXACT), off, clock_set=False)
    judge(None, off)
    judge(ClockReading(0, EXACT), None)
