"""The TCP ports of a stack."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import socket
from dataclasses import dataclass

OWN_PORTS = range(20_000, 32_000)


@dataclass(frozen=True)
class StackPorts:
    """Every TCP port of the stack. `TEMPLATE_MANAGER_DEV_PORT_<NAME>` overrides one."""

    registry: int = 5000
    gcs: int = 4443
    gcs_emulator: int = 4444
    temporal: int = 7233
    temporal_ui: int = 8233
    temporal_metrics: int = 9233
    api: int = 5008
    rest: int = 5009

    @classmethod
    def from_environment(cls) -> StackPorts:
        """The default ports with the environment's changes."""
        names = [f.name for f in dataclasses.fields(cls)]
        found = {name: os.environ.get(port_variable(name)) for name in names}
        return cls(**{name: int(value) for name, value in found.items() if value})

    @classmethod
    def free(cls) -> StackPorts:
        """Ports that are free now, for a stack beside others."""
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**dict(zip(names, free_ports(len(names)), strict=True)))


def port_variable(name: str) -> str:
    """The environment variable that sets a port of `StackPorts`."""
    return f"TEMPLATE_MANAGER_DEV_PORT_{name.upper()}"


def free_port() -> int:
    """A port that nobody listens on now."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different.

    Below those that the kernel gives to outgoing connections: one of these could take a port while
    its server is being restarted.
    """
    found: list[int] = []
    for port in random.sample(OWN_PORTS, len(OWN_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found
