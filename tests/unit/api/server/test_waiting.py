"""Why no host takes a build, from what the hosts tell."""

from __future__ import annotations

import uuid

import pytest

from activities.contract.results import HostBuild, HostFacts
from api.server.waiting import HostSlots, Waiting, Why, slots_of, why_none_takes_it
from tests.support.host_facts import host_facts


def facts(*, slots: int = 2, builds: int = 0, draining: bool = False, lacks: str = "") -> HostFacts:
    held = HostBuild(build_id=str(uuid.uuid4()), template_id="web", since=0.0)
    return host_facts(draining=draining, lacks=lacks, slots=slots, builds=(held,) * builds)


def test_only_hosts_that_take_builds_have_free_slots() -> None:
    told = slots_of(
        {
            "a": facts(slots=4, builds=1),
            "b": facts(slots=2, draining=True),
            "c": facts(slots=1, builds=2),  # its slots were lowered
            "d": None,
            "e": facts(slots=3, lacks="room"),
            "f": facts(slots=2, lacks="room", draining=True),
        }
    )
    assert told == HostSlots(hosts=5, slots=12, free_slots=3, draining=2, full=1, away=1)


@pytest.mark.parametrize(
    ("hosts", "why", "told"),
    [
        (HostSlots(), Why.NO_HOSTS, "no host runs: start one (template-manager host)"),
        (HostSlots(away=2), Why.NO_HOSTS, "none of 2 known hosts answers: start one"),
        (HostSlots(hosts=1, slots=2, draining=1), Why.ALL_DRAINING, "hosts resume"),
        (HostSlots(hosts=2, slots=4, draining=1, full=1), Why.NO_ROOM, "nearly full: free some"),
        (HostSlots(hosts=2, slots=4, full=1), Why.ALL_BUSY, "when a build ends"),
        (HostSlots(hosts=2, slots=4, draining=1), Why.ALL_BUSY, "when a build ends"),
        (HostSlots(hosts=1, slots=2, free_slots=1), Why.SLOT_IS_FREE, "about to take"),
        (None, Why.NOT_KNOWN, "being asked"),
    ],
)
def test_the_reason_is_told_in_words(hosts: HostSlots | None, why: Why, told: str) -> None:
    assert why_none_takes_it(hosts, works=True, polled=False) is why
    assert told in Waiting(why, 0, hosts).message


def test_without_a_worker_nobody_asks_the_hosts() -> None:
    assert why_none_takes_it(None, works=False, polled=True) is Why.NO_WORKER


def test_a_host_that_has_just_started_is_not_taken_for_none() -> None:
    assert why_none_takes_it(HostSlots(), works=True, polled=True) is Why.SLOT_IS_FREE
