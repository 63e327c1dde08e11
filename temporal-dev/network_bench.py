"""How fast a guest's way to the internet is, for `make bench`, beside the host's own.

The internet is one of namespaces (`devstack.inner_internet`); the guest is one, too, with a wire in
the place of its TAP, so that it is the way that is measured and not the machine's VM.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from devstack.inner_internet import PUBLIC, inner_internet, wire_between
from pyroute2 import IPRoute
from rich.console import Console
from rich.table import Table

from activities.contract.guest_network import GUEST_ADDRESS, HOST_ADDRESS, PREFIX_BITS, TAP
from activities.disk.cgroups import kill_cgroup
from activities.microvm.egress import Egress, open_egress
from activities.microvm.launching import cgroups_of, prepare_egress
from activities.microvm.network import create_network, in_network, remove_network
from activities.microvm.vm_process import SUPERVISOR

MIB = 1 << 20
READ_BYTES = 1 << 18
READY_SECONDS = 30.0
NAMES = ("bench-way", "bench-guest")


class Speeds(NamedTuple):
    """MiB/s, and how long a connection takes to be made, in ms."""

    mib_per_second: float
    connect_ms: float


def bench_network(place: Path, small: bool, console: Console) -> None:
    """Fetch from a server by the host's own way and by a guest's."""
    size = (32 if small else 256) * MIB
    (place / "internet").mkdir()
    with inner_internet(place / "internet") as internet:
        internet.pages["/large"] = os.urandom(MIB) * (size // MIB)
        own = internet.from_host(lambda: _fetch(size))
        guests = internet.from_host(lambda: _by_the_guests_way(place, size))
    table = Table(title=f"A guest's way to the internet: {size // MIB} MiB by one connection")
    for column in ("way", "MiB/s", "connect, ms"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, speeds in (("the host's own", own), ("slirp4netns behind the table", guests)):
        table.add_row(name, f"{speeds.mib_per_second:.0f}", f"{speeds.connect_ms:.1f}")
    console.print(table)


def _by_the_guests_way(place: Path, size: int) -> Speeds:
    with _guests_way(place / NAMES[0]):
        return in_network(NAMES[1], lambda: _fetch(size))


@contextmanager
def _guests_way(directory: Path) -> Iterator[None]:
    """Have both namespaces, and what leads from the one to the internet."""
    directory.mkdir()
    way, guest = NAMES
    for name in NAMES:
        create_network(name)
    try:
        _replace_tap(way, guest)
        open_egress(way, Egress(denied=()))
        prepare_egress(directory, ())
        with _supervised(directory):
            yield
    finally:
        for cgroup in cgroups_of(directory):
            kill_cgroup(cgroup)
        for name in NAMES:
            remove_network(name)


def _replace_tap(way: str, guest: str) -> None:
    def remove() -> None:
        with IPRoute() as route:
            route.link("del", index=route.link_lookup(ifname=TAP)[0])

    def settle(name: str, address: str, gateway: str | None) -> None:
        with IPRoute() as route:
            index = route.link_lookup(ifname=name)[0]
            route.addr("add", index=index, address=address, prefixlen=PREFIX_BITS)
            route.link("set", index=index, state="up")
            if gateway:
                route.route("add", dst="default", gateway=gateway)

    for name in NAMES:
        in_network(name, remove)
    wire_between(way, TAP, guest, "eth0")
    in_network(way, lambda: settle(TAP, HOST_ADDRESS, None))
    in_network(guest, lambda: settle("eth0", GUEST_ADDRESS, HOST_ADDRESS))


@contextmanager
def _supervised(directory: Path) -> Iterator[None]:
    """Have a VM's supervisor there, of a program that is no VMM."""
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-I", "-S"]
    command += [str(SUPERVISOR), directory.name, "1000", "sleep", "1000"]
    with subprocess.Popen(command, cwd=directory) as supervisor:
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not (directory / "vmm.json").exists():
                if supervisor.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("slirp4netns does not start")
                time.sleep(0.05)
            yield
        finally:
            supervisor.kill()


def _fetch(size: int) -> Speeds:
    began = time.monotonic()
    with socket.create_connection((PUBLIC, 80), timeout=60) as one:
        connected = time.monotonic()
        one.sendall(b"GET /large HTTP/1.0\r\n\r\n")
        received = 0
        while data := one.recv(READ_BYTES):
            received += len(data)
    if received < size:
        raise RuntimeError(f"{received} of {size} bytes came")
    seconds = time.monotonic() - connected
    return Speeds(received / MIB / seconds, (connected - began) * 1000)
