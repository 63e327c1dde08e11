"""What a policy means on a host, and the table that keeps a guest to it."""

from __future__ import annotations

import socket
from ipaddress import IPv4Network
from typing import Any

import pytest

from activities.contract.errors import HostFaultError, NetworkNameError
from activities.contract.network_policy import INTERNET, NO_NETWORK, NetworkAccess, NetworkPolicy
from activities.microvm.egress import Egress, egress_of, table
from activities.process.settings import Settings

SETTINGS = Settings(denied_networks=(IPv4Network("203.0.113.0/28"),))


def named(*allowed: str) -> NetworkPolicy:
    return NetworkPolicy(access=NetworkAccess.ALLOW, allowed=allowed)


def meant(policy: NetworkPolicy) -> Egress | None:
    return egress_of(SETTINGS, policy, lambda: None)


def test_none_is_no_way_out() -> None:
    assert meant(NO_NETWORK) is None


def test_what_is_not_public_and_what_an_operator_names_are_denied() -> None:
    egress = meant(INTERNET)
    assert egress is not None
    assert egress.allowed is None
    wanted = ["127.0.0.1", "10.0.2.2", "169.254.169.254", "192.168.1.1", "224.0.0.1", "203.0.113.9"]
    for address in wanted:
        assert any(IPv4Network(address).subnet_of(each) for each in egress.denied), address


def test_names_are_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in ("1.1.1.1", "1.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    egress = meant(named("one.example.com", "203.0.113.64/26"))
    assert egress is not None
    assert egress.allowed == tuple(map(IPv4Network, ("1.1.1.1", "1.0.0.1", "203.0.113.64/26")))


@pytest.mark.parametrize(
    ("number", "error"),
    [(socket.EAI_NONAME, NetworkNameError), (socket.EAI_AGAIN, HostFaultError)],
)
def test_a_name_without_an_address_is_no_fault_of_the_host(
    monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def fail(*_: Any) -> None:
        raise socket.gaierror(number, "told")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(error, match=r"one\.example\.com"):
        meant(named("one.example.com"))


def test_a_list_that_allows_nothing_allows_nothing() -> None:
    assert "ip daddr != @allowed reject" in table(Egress(denied=(), allowed=()))
    assert "@allowed reject" not in table(Egress(denied=()))
