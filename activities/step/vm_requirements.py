"""What a host must have on its disk for a build's VM, checked before any work is done for it."""

from __future__ import annotations

import os
from pathlib import Path

from activities.contract.errors import (
    AgentMissingError,
    FirecrackerMissingError,
    HugePagesUnsupportedError,
    KernelMissingError,
)
from activities.contract.scope import VmShape
from activities.process.settings import Settings


def require_parts(settings: Settings, shape: VmShape) -> None:
    """Check that this host has all that a build of such a VM takes from its disk.

    Raises AgentMissingError, and what `require_host` does.
    """
    require_host(settings, shape)
    agent = settings.guest_agent_path
    if agent is not None and not agent.exists():
        raise AgentMissingError(f"host {settings.host} has no guest agent at {agent}")


def require_host(settings: Settings, shape: VmShape) -> Path:
    """Check that this host can run such a VM; returns Firecracker's path.

    Raises KernelMissingError, FirecrackerMissingError or HugePagesUnsupportedError.
    """
    if shape.huge_pages:
        raise HugePagesUnsupportedError(
            "huge pages need a page-fault handler: Firecracker does not load such a snapshot "
            "from a file"
        )
    kernel = settings.kernel_path(shape.kernel_version)
    if not kernel.exists():
        raise KernelMissingError(f"host {settings.host} has no kernel at {kernel}")
    firecracker = settings.firecracker_path(shape.firecracker_version)
    if not os.access(firecracker, os.X_OK):
        raise FirecrackerMissingError(f"host {settings.host} has no Firecracker at {firecracker}")
    return firecracker
