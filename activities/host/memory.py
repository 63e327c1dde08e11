"""The memory that the VMs of a host's builds may take."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from activities.contract.inputs import HoldHostInput
from activities.contract.units import MIB
from activities.process.settings import Settings


@dataclass(frozen=True)
class HostMemory:
    """What the VMs of a host's builds may take, in MiB."""

    total_mb: int
    """Of all builds together."""
    overhead_mb: int
    """Of a VMM besides its guest."""
    steps_mb: int
    """What the VM of a step has at least."""

    @classmethod
    def of(cls, settings: Settings) -> HostMemory:
        """Return what an operator says, or what the machine has but for a tenth."""
        machine_mb = psutil.virtual_memory().total * 9 // 10 // MIB
        return cls(
            total_mb=settings.host_memory_mb or machine_mb,
            overhead_mb=settings.vm_overhead_mb,
            steps_mb=settings.image_step_memory_mb,
        )

    def of_build(self, hold: HoldHostInput) -> int:
        """Return what the largest VM of a build takes; 0 when it does not tell."""
        if hold.shape is None:
            return 0
        steps_mb = self.steps_mb if hold.runs_steps else 0
        return max(hold.shape.memory_mb, steps_mb) + self.overhead_mb


UNCOUNTED = HostMemory(total_mb=2**40, overhead_mb=0, steps_mb=0)
