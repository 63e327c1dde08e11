"""A VM's network: a netns of its own with `tap0` in it.

Made without a fork, which would break gRPC and Temporal's client: a thread of its own unshares its
network namespace, gives it a name, and configures it with a plain pyroute2 socket. pyroute2's own
`netns.create`, `NetNS` and `IPRoute(netns=…)` all fork.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from pyroute2 import IPRoute, NetlinkError, netns
from temporalio import activity

from activities.contract.errors import HostFaultError
from activities.contract.guest_network import HOST_ADDRESS, PREFIX_BITS, TAP
from activities.contract.interface import NetworkActivities
from activities.contract.scope import VmRef
from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover, entries, made_at
from activities.disk.namespaces import Namespace, in_own_thread, unshare
from activities.microvm.vm_names import is_left_by_passing, is_superseded, leftover_of_vm
from activities.process.settings import Settings
from activities.step.ledger import LeaseLedger

T = TypeVar("T")

NETNS_DIRECTORY = Path("/run/netns")
NET_SETTINGS = Path("/proc/sys/net")
"""Of the netns of whoever looks."""
NAME_PREFIX = "tm-"
BUSY_SECONDS = 10.0
THREAD = "netns"
# linux/if_tun.h
TUNSETIFF, TUNSETOWNER = 0x400454CA, 0x400454CC
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000


class NetnsNetworkActivities(NetworkActivities):
    """Makes and removes the networks of this host's VMs. See `interface` for the contract."""

    def __init__(self, settings: Settings, ledger: LeaseLedger) -> None:
        self._data_dir = DataDir(settings.data_dir)
        self._ledger = ledger

    @activity.defn(name="set_up_network")
    async def set_up_network(self, vm: VmRef, /) -> None:
        """Make the VM's netns with `tap0` in it."""
        self._ledger.require(vm.scope)
        await asyncio.to_thread(make_network, vm, self._data_dir)

    @activity.defn(name="tear_down_network")
    async def tear_down_network(self, vm: VmRef, /) -> None:
        """Remove the VM's netns, and that of any earlier lease of the same build and purpose."""
        await asyncio.to_thread(remove_networks_until, vm, self._data_dir)


def make_network(vm: VmRef, data_dir: DataDir) -> None:
    """Make the network of a VM of this host. Raises HostFaultError when the kernel refuses."""
    # A name in /run/netns does not tell which host of this machine made it.
    mark = data_dir.network_mark(vm.name)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    create_network(vm.name)


def create_network(name: str) -> None:
    """Make a netns with loopback and `tap0` up. What is there, whole or half-made, is completed.

    Raises HostFaultError when the kernel refuses.
    """
    try:
        if name in netns.listnetns():
            in_network(name, _configure)
        else:
            in_own_thread(lambda: _create(name), THREAD)
    except (OSError, NetlinkError) as error:
        raise HostFaultError(f"cannot make the network {name}: {error}") from error


def give_tap(name: str, uid: int) -> None:
    """Let a user without any privilege use the TAP of a network. Raises HostFaultError."""
    try:
        in_network(name, lambda: _set_owner(uid))
    except OSError as error:
        raise HostFaultError(f"cannot give {TAP} of {name} to a user: {error}") from error


def remove_network(name: str) -> None:
    """Remove a netns and all devices in it. A TAP that a dying VMM still holds is waited for."""
    deadline = time.monotonic() + BUSY_SECONDS
    while name in netns.listnetns():
        try:
            netns.remove(name)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT) or time.monotonic() > deadline:
                raise HostFaultError(f"cannot remove the network {name}: {error}") from error
            time.sleep(0.05)


def networks_of(build_id: str | None = None) -> list[str]:
    """Return the names of our networks, of one build or of all."""
    prefix = f"{NAME_PREFIX}{build_id}-" if build_id else NAME_PREFIX
    return [name for name in netns.listnetns() if name.startswith(prefix)]


def remove_networks_until(vm: VmRef, data_dir: DataDir) -> None:
    """Remove the networks of this VM and of the same VM under earlier leases, and their marks."""
    marks = data_dir.networks
    marked = [path.name for path in marks.iterdir()] if marks.is_dir() else []
    for name in {*networks_of(vm.scope.build_id), *marked}:
        if is_superseded(name, vm):
            remove_network(name)
            data_dir.network_mark(name).unlink(missing_ok=True)


def leftover_networks(data_dir: DataDir) -> Iterator[Leftover]:
    """Yield the networks that this host has made, and passing ones whose process has ended."""
    for mark in entries(data_dir.networks):
        yield from leftover_of_vm("netns", mark.name, partial(_remove_marked, mark), made_at(mark))
    yield from passing_networks()


def passing_networks() -> Iterator[Leftover]:
    """Yield the networks of `run` and `doctor` whose process has ended."""
    for path in entries(NETNS_DIRECTORY):
        if is_left_by_passing(path.name):
            yield Leftover("netns", path.name, partial(remove_network, path.name))


def in_network(name: str, function: Callable[[], T]) -> T:
    """Run `function` in a fresh thread inside that netns; returns and raises what it does."""

    def run() -> T:
        netns.setns(name, flags=0)  # the default flags fork
        return function()

    return in_own_thread(run, THREAD)


def _remove_marked(mark: Path) -> None:
    remove_network(mark.name)
    mark.unlink(missing_ok=True)


def _create(name: str) -> None:
    unshare(Namespace.NETWORK)
    netns.attach(name, threading.get_native_id())
    _configure()


def _distrust_tap() -> None:
    """Believe of the guest's addresses only its own, and speak no IPv6 with it.

    The kernel's tables of neighbours are one for the whole machine, and each address that a guest
    claims to have takes a place in them.
    """
    for setting, value in (
        (f"ipv4/conf/{TAP}/rp_filter", "1"),
        (f"ipv6/conf/{TAP}/disable_ipv6", "1"),
    ):
        with suppress(FileNotFoundError):  # a kernel without IPv6
            (NET_SETTINGS / setting).write_text(value)


def _set_owner(uid: int) -> None:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", TAP.encode(), IFF_TAP | IFF_NO_PI))
        fcntl.ioctl(tun, TUNSETOWNER, uid)
    finally:
        os.close(tun)


def _configure() -> None:
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
        found = route.link_lookup(ifname=TAP)
        if not found:
            route.link("add", ifname=TAP, kind="tuntap", mode="tap")
            found = route.link_lookup(ifname=TAP)
        _distrust_tap()
        try:
            route.addr("add", index=found[0], address=HOST_ADDRESS, prefixlen=PREFIX_BITS)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
        route.link("set", index=found[0], state="up")
