"""What a host tells, for tests that ask none."""

from __future__ import annotations

from typing import Any

from activities.contract.results import HostFacts


def host_facts(**changes: Any) -> HostFacts:
    """Return the facts of an idle host of two slots, but for these changes."""
    told: dict[str, Any] = {
        "host": "kvm-1",
        "draining": False,
        "slots": 2,
        "builds": (),
        "disk_free_bytes": 1,
        "disk_total_bytes": 2,
        "checkpoint_bytes": 0,
        "kernel_versions": (),
        "firecracker_versions": (),
        "version": "0",
    }
    return HostFacts(**(told | changes))
