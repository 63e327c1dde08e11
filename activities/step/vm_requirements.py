"""What a host must have on its disk for a build's VM, checked before any work is done for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil

from activities.contract.errors import (
    AgentMissingError,
    EgressMissingError,
    FirecrackerMissingError,
    HostTooSmallError,
    KernelMissingError,
)
from activities.contract.scope import VmShape
from activities.contract.units import MIB
from activities.process.settings import Settings
from activities.step.build_log import BuildLog

# What leads a guest to the internet: program, and the Debian package that has it.
EGRESS_PROGRAMS = {"slirp4netns": "slirp4netns", "nft": "nftables"}
NO_HUGE_PAGES = (
    "huge pages were asked for; this template's memory is of ordinary pages: Firecracker loads a "
    "snapshot with huge pages only through a page-fault handler"
)


def require_parts(settings: Settings, shape: VmShape, log: BuildLog) -> None:
    """Check that this host has all that a build of such a VM takes from its disk.

    Huge pages are a wish that every client of E2B's has for every Firecracker since 1.7; what comes
    of it is the host's to choose, and is said in the log. Raises AgentMissingError, and what
    `require_host` does.
    """
    require_host(settings, shape)
    if shape.huge_pages:
        log.warn(NO_HUGE_PAGES)
    agent = settings.guest_agent_path
    if agent is not None and not agent.exists():
        raise AgentMissingError(f"host {settings.host} has no guest agent at {agent}")
    if agent is None and settings.require_guest_agent:
        raise AgentMissingError(f"host {settings.host} has no guest agent, which is required")


def require_host(settings: Settings, shape: VmShape) -> Path:
    """Check that this host can run such a VM; returns Firecracker's path.

    Raises KernelMissingError, FirecrackerMissingError, HostTooSmallError or EgressMissingError.
    """
    kernel = settings.kernel_path(shape.kernel_version)
    if not kernel.exists():
        raise KernelMissingError(f"host {settings.host} has no kernel at {kernel}")
    firecracker = settings.firecracker_path(shape.firecracker_version)
    if not os.access(firecracker, os.X_OK):
        raise FirecrackerMissingError(f"host {settings.host} has no Firecracker at {firecracker}")
    memory_mb = psutil.virtual_memory().total // MIB
    if shape.memory_mb > memory_mb:
        raise HostTooSmallError(
            f"host {settings.host} has {memory_mb} MiB of memory; {shape.memory_mb} are asked for"
        )
    missing = missing_for_egress()
    if shape.network.leads_out and missing:
        raise EgressMissingError(
            f"host {settings.host} has no {' and no '.join(missing)}: its guests reach no network; "
            f"the build's is {shape.network}"
        )
    return firecracker


def missing_for_egress() -> list[str]:
    """Return the Debian packages that this machine lacks to lead a guest to the internet."""
    return sorted(pkg for name, pkg in EGRESS_PROGRAMS.items() if shutil.which(name) is None)
