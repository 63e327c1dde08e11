"""What a build's guests may reach: nothing, the internet, or what is named of it."""

from __future__ import annotations

from enum import StrEnum

from activities.contract.model import Model

MAX_ALLOWED = 50
"""Destinations that a request may name."""


class NetworkAccess(StrEnum):
    """How far steps and start commands may reach."""

    NONE = "none"
    ALLOW = "allow"
    INTERNET = "internet"


class NetworkPolicy(Model):
    """What the VMs of a build's steps and of its start command may reach.

    Nothing of the inside, whatever it says: see `activities.microvm.egress`.
    """

    access: NetworkAccess = NetworkAccess.NONE
    allowed: tuple[str, ...] = ()
    """Of `ALLOW`: IPv4 networks (CIDR) and host names."""

    @property
    def leads_out(self) -> bool:
        """Whether there is anything to reach."""
        return self.access is not NetworkAccess.NONE

    def __str__(self) -> str:
        """Return it as users read it."""
        if self.access is NetworkAccess.ALLOW:
            return f"only {', '.join(self.allowed)}"
        return self.access.value


NO_NETWORK = NetworkPolicy()
INTERNET = NetworkPolicy(access=NetworkAccess.INTERNET)
