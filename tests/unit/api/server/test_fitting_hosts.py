"""Which host can run a build, from what the hosts tell."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from activities.contract.inputs import FindHostInput
from activities.contract.network_policy import INTERNET
from activities.contract.results import FoundHost, HostBuild, HostFacts, MachineFacts
from activities.contract.scope import VmShape
from activities.contract.units import MIB
from api.server.fitting_hosts import choose, is_fit
from tests.support.host_facts import host_facts

SHAPE = VmShape(memory_mb=1024, vcpu_count=1, kernel_version="6.1", firecracker_version="v1.13.1")
FIND = FindHostInput(shape=SHAPE, refused=())


def facts(host: str = "a", *, memory_mb: int = 2048, builds: int = 0, **changes: Any) -> HostFacts:
    held = HostBuild(build_id=str(uuid.uuid4()), template_id="web", since=0.0)
    told: dict[str, Any] = {
        "host": host,
        "builds": (held,) * builds,
        "kernel_versions": ("5.10", "6.1"),
        "firecracker_versions": ("v1.13.1",),
        "machine": MachineFacts(memory_total_bytes=memory_mb * MIB),
    }
    return host_facts(**(told | changes))


@pytest.mark.parametrize(
    ("told", "fit"),
    [
        (facts(), True),
        (facts(memory_mb=1024), True),
        (facts(memory_mb=1023), False),
        (facts(kernel_versions=("5.10",)), False),
        (facts(firecracker_versions=()), False),
        (facts(machine=None), True),  # of an earlier version: it says when it is asked
    ],
)
def test_kernel_firecracker_and_memory_decide(told: HostFacts, fit: bool) -> None:
    assert is_fit(told, SHAPE) is fit


def test_a_network_takes_a_host_that_leads_out() -> None:
    shape = SHAPE.model_copy(update={"network": INTERNET})
    assert not is_fit(facts(), shape)  # of an earlier version, or without the programs
    assert is_fit(facts(leads_out=True), shape)


def test_the_one_with_the_most_free_slots_is_chosen() -> None:
    told = {
        "busy": facts("busy", builds=2),
        "free": facts("free", builds=1),
        "drained": facts("drained", draining=True),
        "old": facts("old", kernel_versions=()),
        "away": None,
    }
    assert choose(FIND, told) == FoundHost(host="free", is_drained=True, may_come=True)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({}, FoundHost()),
        ({"old": facts("old", kernel_versions=())}, FoundHost()),
        ({"old": facts("old", kernel_versions=()), "away": None}, FoundHost(may_come=True)),
        ({"drained": facts("drained", draining=True)}, FoundHost(is_drained=True)),
    ],
)
def test_where_none_can_one_that_may_come_is_waited_for(
    told: dict[str, HostFacts | None], found: FoundHost
) -> None:
    assert choose(FIND, told) == found
