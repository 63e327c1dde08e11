"""A VM's netns and TAP, by the real kernel."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from devstack.workbench import Workbench, workbench
from pyroute2 import IPRoute
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import LeaseLostError
from activities.contract.guest_network import GUEST_ADDRESS
from activities.contract.names import VmPurpose
from activities.contract.scope import VmRef
from activities.microvm.network import (
    NetnsNetworkActivities,
    create_network,
    in_network,
    networks_of,
    remove_network,
)

pytestmark = pytest.mark.counts_host

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP_NO_PI = 0x1002


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Workbench]:
    before = networks_of()
    yield workbench(tmp_path)
    assert networks_of() == before


def vm_of(host: Workbench, build_id: str | None = None, number: int = 1) -> VmRef:
    return VmRef(scope=host.scope(build_id, number), purpose=VmPurpose.BOOT)


def links_in(name: str) -> dict[str, str]:
    def read() -> dict[str, str]:
        with IPRoute() as route:
            return {
                str(link.get_attr("IFLA_IFNAME")): "up" if link["flags"] & 1 else "down"
                for link in route.get_links()
            }

    return in_network(name, read)


def addresses_in(name: str) -> set[str]:
    def read() -> set[str]:
        with IPRoute() as route:
            return {
                f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}"
                for address in route.get_addr(family=2)
            }

    return in_network(name, read)


async def test_a_network_of_its_own(host: Workbench) -> None:
    networks = NetnsNetworkActivities(host.settings, host.ledger)
    vm = vm_of(host)
    await ActivityEnvironment().run(networks.set_up_network, vm)
    assert links_in(vm.name) == {"lo": "up", "tap0": "up"}
    assert "169.254.0.22/30" in addresses_in(vm.name)
    await ActivityEnvironment().run(networks.set_up_network, vm)  # twice is the same
    assert links_in(vm.name) == {"lo": "up", "tap0": "up"}
    await ActivityEnvironment().run(networks.tear_down_network, vm)
    assert vm.name not in networks_of()
    await ActivityEnvironment().run(networks.tear_down_network, vm)  # and so is its removal


async def test_half_made_networks_are_completed(host: Workbench) -> None:
    name = vm_of(host).name
    subprocess.run(["ip", "netns", "add", name], check=True)  # a worker died right after this
    create_network(name)
    assert links_in(name) == {"lo": "up", "tap0": "up"}
    remove_network(name)


async def test_two_attempts_at_once_make_one_network(host: Workbench) -> None:
    name = vm_of(host).name
    await asyncio.gather(
        *(asyncio.to_thread(create_network, name) for _ in range(4)), return_exceptions=True
    )
    create_network(name)
    assert links_in(name) == {"lo": "up", "tap0": "up"}
    remove_network(name)


async def test_networks_do_not_see_each_other(host: Workbench) -> None:
    one, other = vm_of(host).name, vm_of(host).name
    create_network(one)
    create_network(other)  # the same addresses, no clash
    assert addresses_in(one) == addresses_in(other)
    remove_network(one)
    remove_network(other)


async def test_nothing_leads_out(host: Workbench) -> None:
    """A build's guest gets no way to the host's network or the internet."""
    name = vm_of(host).name
    create_network(name)

    def routes() -> set[str]:
        with IPRoute() as route:
            return {str(r.get_attr("RTA_GATEWAY")) for r in route.get_routes(family=2)}

    assert in_network(name, routes) == {"None"}
    remove_network(name)


async def test_a_later_lease_removes_the_networks_of_earlier_ones(host: Workbench) -> None:
    networks = NetnsNetworkActivities(host.settings, host.ledger)
    build_id = str(uuid.uuid4())
    old, new = vm_of(host, build_id, 1), vm_of(host, build_id, 2)
    verify = VmRef(scope=new.scope, purpose=VmPurpose.VERIFY)
    for vm in (old, new, verify):
        create_network(vm.name)
    await ActivityEnvironment().run(networks.tear_down_network, old)
    assert set(networks_of(build_id)) == {new.name, verify.name}
    create_network(old.name)
    await ActivityEnvironment().run(networks.tear_down_network, new)
    assert networks_of(build_id) == [verify.name]
    remove_network(verify.name)


async def test_a_host_without_the_lease_makes_no_network(host: Workbench) -> None:
    networks = NetnsNetworkActivities(host.settings, host.ledger)
    old = vm_of(host, number=1)
    host.scope(old.scope.build_id, number=2)
    with pytest.raises(LeaseLostError):
        await ActivityEnvironment().run(networks.set_up_network, old)
    assert networks_of(old.scope.build_id) == []


async def test_a_tap_that_is_still_held_goes_when_it_is_let_go(host: Workbench) -> None:
    """A dying VMM may hold the TAP: the netns' name goes at once and a new one can be made."""
    name = vm_of(host).name
    create_network(name)

    def hold() -> int:
        device = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"tap0", IFF_TAP_NO_PI))
        return device

    device = in_network(name, hold)
    try:
        remove_network(name)
        create_network(name)
        assert links_in(name)["tap0"] == "up"
    finally:
        os.close(device)
        remove_network(name)


def test_the_guests_address_is_in_the_network() -> None:
    assert GUEST_ADDRESS == "169.254.0.21"
