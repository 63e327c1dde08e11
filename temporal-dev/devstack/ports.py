"""The TCP ports of a stack."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from devstack import processes


@dataclass(frozen=True)
class StackPorts:
    """Every TCP port of the stack. `TEMPLATE_MANAGER_DEV_PORT_<NAME>` overrides one."""

    registry: int = 5000
    gcs: int = 4443
    gcs_emulator: int = 4444
    temporal: int = 7233
    temporal_ui: int = 8233
    api: int = 5008

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
        return cls(**dict(zip(names, processes.free_ports(len(names)), strict=True)))


def port_variable(name: str) -> str:
    """The environment variable that sets a port of `StackPorts`."""
    return f"TEMPLATE_MANAGER_DEV_PORT_{name.upper()}"
