from __future__ import annotations

import pytest
from fleet import SMALL, Held, Process, Ran, all_wait, shares, wanted_shares

HELD = [
    Held("a", 0, 10),
    Held("b", 0, 10),
    Held("b", 10, 20),
    Held("a", 12, 20),
]


def test_a_share_is_of_the_time_of_slots_that_were_held() -> None:
    assert shares(HELD, 0, 10) == {"a": 0.5, "b": 0.5}
    assert shares(HELD, 5, 15) == pytest.approx({"a": 8 / 18, "b": 10 / 18})
    assert shares(HELD, 30, 40) == {"a": 0, "b": 0}


def test_all_wait_until_the_last_build_of_one_tenant_has_a_host() -> None:
    assert all_wait(HELD, 0) == (0, 10)


def test_weights_are_told_as_shares() -> None:
    assert wanted_shares({"a": 1, "b": 1, "c": 2}) == {"a": 0.25, "b": 0.25, "c": 0.5}


def test_the_ideal_is_that_no_slot_ever_waits() -> None:
    assert SMALL.ideal_seconds == 8 * 5 / 4
    ran = Ran(SMALL, -2.5, HELD, [1], [1], {}, [], 0)
    assert ran.makespan == 22.5
    assert ran.of_ideal == pytest.approx(10 / 22.5)
    assert ran.busy == pytest.approx(38 / 22.5)


def test_a_machine_carries_as_many_slots_as_its_processors_can_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    used = [Process("temporal", 100, 6), Process("worker", 100, 2)]
    ran = Ran(SMALL, 0, HELD, [1], [1], {}, used, open_cpu_seconds=7)
    assert ran.cpu_seconds == 2  # of each of four builds
    assert ran.processors == 7 / 20
    assert ran.carried_slots == 5  # each busy for five seconds with two of processors' time
