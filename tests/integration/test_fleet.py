"""A small fleet at work: the bench of `make bench`, with what holds on a busy machine, too."""

from __future__ import annotations

import pytest
from fleet import MOST_EVENTS, Fleet, run_fleet, tell
from rich.console import Console

pytestmark = pytest.mark.counts_nothing

TINY = Fleet(2, 1, {"acme": 2, "beta": 2}, {"acme": 1, "beta": 1}, 2)


def test_a_fleet_builds_with_few_events() -> None:
    ran = run_fleet(TINY)
    tell(ran, Console())
    assert sorted(held.tenant for held in ran.held) == ["acme", "acme", "beta", "beta"]
    assert ran.makespan > TINY.ideal_seconds
    assert 0 < ran.busy <= TINY.slot_count
    assert 0 < ran.open_cpu_seconds < ran.cpu_seconds * len(ran.held)
    assert max(ran.events) <= MOST_EVENTS
    assert ran.calls["RespondWorkflowTaskCompleted"] >= 4 * 5  # a busy worker takes several at once
    names = [process.name for process in ran.processes]
    assert names == ["temporal", "worker", "gcs", "gcs-emulator", "hosts from 0"]
