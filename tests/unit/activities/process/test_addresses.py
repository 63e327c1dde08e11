from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.process.addresses import (
    INSIDE,
    Address,
    InternalRegistries,
    is_inside,
    own_addresses,
)

IPV4_INSIDE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
]
OUTSIDE = ["1.1.1.1", "172.32.0.1", "100.128.0.1", "192.169.0.1", "2606:4700:4700::1111"]


@pytest.mark.parametrize("text", IPV4_INSIDE)
def test_it_is_inside_in_each_of_its_forms(text: str) -> None:
    plain = ipaddress.IPv4Address(text)
    number = int(plain)
    forms: list[Address] = [
        plain,
        ipaddress.IPv6Address(f"::ffff:{plain}"),
        ipaddress.IPv6Address(f"::{plain}"),
        ipaddress.IPv6Address(f"64:ff9b::{plain}"),
        ipaddress.IPv6Address((0x2002 << 112) | (number << 80)),
        ipaddress.IPv6Address((0x20010000 << 96) | (number ^ 0xFFFFFFFF)),
    ]
    assert all(map(is_inside, forms)), [str(form) for form in forms if not is_inside(form)]


@pytest.mark.parametrize(
    "text", ["::", "::1", "fe80::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1"]
)
def test_ipv6_has_an_inside_too(text: str) -> None:
    assert is_inside(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", [*OUTSIDE, "::ffff:1.1.1.1", "64:ff9b::1.1.1.1"])
def test_the_outside_is_not_inside(text: str) -> None:
    assert not is_inside(ipaddress.ip_address(text))


@given(st.sampled_from(INSIDE).flatmap(lambda network: st.ip_addresses(network=network)))
def test_every_address_of_these_networks_is_inside(address: Address) -> None:
    assert is_inside(address)


def test_this_machines_own_addresses_are_known() -> None:
    assert ipaddress.ip_address("127.0.0.1") in own_addresses()


def test_an_operator_allows_names_and_networks() -> None:
    allowed = InternalRegistries(("One.test", "two.test:5000", ipaddress.ip_network("10.0.0.0/8")))
    assert allowed.name("one.TEST", 1)
    assert allowed.name("two.test", 5000)
    assert not allowed.name("two.test", 443)
    assert not allowed.name("10.0.0.0/8", 443)
    assert allowed.hold(ipaddress.ip_address("10.1.2.3"))
    assert not allowed.hold(ipaddress.ip_address("11.1.2.3"))
