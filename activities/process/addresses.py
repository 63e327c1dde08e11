"""Which addresses are of the outside, for registries and guests, and what an operator allows."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import psutil

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# What `is_global` of every Python that we run on says, or once said, otherwise.
INSIDE = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "224.0.0.0/3",
        "::/96",  # with IPv4-compatible addresses
        "64:ff9b:1::/48",
        "fc00::/7",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)
INNER_NAMES = (".localhost", ".local", ".internal", ".lan", ".home.arpa", ".svc", ".corp")
NAT64 = IPv6Network("64:ff9b::/96")


def is_inside(address: Address) -> bool:
    """Whether an address is loopback, private, link-local, multicast or otherwise not public.

    An IPv6 address that carries an IPv4 one (mapped, NAT64, 6to4, Teredo) counts as that one.
    """
    return any(_is_inside(one) for one in _meant(address))


def literal_address(host: str) -> Address | None:
    """Return the address that a host is written as, in any of the forms that C libraries take."""
    with contextlib.suppress(OSError):
        return IPv4Address(socket.inet_aton(host))
    return _parsed(host)


def is_inner_name(host: str) -> bool:
    """Whether a name says itself that it is of the inside."""
    plain = host.rstrip(".").lower()
    return "." not in plain or plain.endswith(INNER_NAMES)


def own_addresses() -> frozenset[Address]:
    """Return the addresses of this machine's interfaces."""
    told = (one.address for found in psutil.net_if_addrs().values() for one in found)
    return frozenset(address for text in told if (address := _parsed(text)) is not None)


@dataclass(frozen=True)
class InternalRegistries:
    """What an operator allows of the inside: `host[:port]` of registries, and networks."""

    entries: tuple[Network | str, ...] = ()

    def name(self, host: str, port: int) -> bool:
        """Whether a host is allowed by its name, whatever its address is."""
        named = {entry.lower() for entry in self.entries if isinstance(entry, str)}
        return not named.isdisjoint({host.lower(), f"{host.lower()}:{port}"})

    def hold(self, address: Address) -> bool:
        """Whether an address is in one of the networks."""
        networks = [entry for entry in self.entries if not isinstance(entry, str)]
        return any(address in network for network in networks)


def _parsed(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:  # of a network card
        return None


def _is_inside(address: Address) -> bool:
    return not address.is_global or any(address in network for network in INSIDE)


def _meant(address: Address) -> list[Address]:
    if isinstance(address, IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    teredo = address.teredo or ()
    return [address, *([address.sixtofour] if address.sixtofour else []), *teredo, *_nat64(address)]


def _nat64(address: IPv6Address) -> list[Address]:
    return [IPv4Address(int(address) & 0xFFFFFFFF)] if address in NAT64 else []
