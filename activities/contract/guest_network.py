"""A guest's network, as it stands in every snapshot: consumers make the other end of it."""

from __future__ import annotations

TAP = "tap0"
HOST_ADDRESS = "169.254.0.22"
GUEST_ADDRESS = "169.254.0.21"
PREFIX_BITS = 30
NETMASK = "255.255.255.252"
GUEST_MAC = "02:FC:00:00:00:05"
HOST_NAME = "instance"
