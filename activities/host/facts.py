"""What a host tells of itself, and draining it before maintenance."""

from __future__ import annotations

import asyncio
import importlib.metadata
import shutil
from pathlib import Path

from temporalio import activity

from activities.contract.inputs import HostRequest
from activities.contract.interface import HostFactsActivities
from activities.contract.results import HostBuild, HostFacts
from activities.disk.data_dir import DataDir
from activities.host.admission import Admission
from activities.host.machine import tell_machine
from activities.process.settings import Settings
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger
from activities.step.vm_requirements import missing_for_egress


class KvmHostFactsActivities(HostFactsActivities):
    """Implements `tell_host`. See `interface` for the contract."""

    def __init__(
        self,
        settings: Settings,
        ledger: LeaseLedger,
        admission: Admission,
        store: CheckpointStore,
    ) -> None:
        self._settings = settings
        self._data_dir = DataDir(settings.data_dir)
        self._ledger = ledger
        self._admission = admission
        self._store = store

    @activity.defn(name="tell_host")
    async def tell_host(self, request: HostRequest, /) -> HostFacts:
        """Drain or resume if that is asked for, then tell slots, builds, disk and versions."""
        if request.draining is not None:
            set_draining(self._data_dir, request.draining)
            if request.draining:
                await self._admission.close()
            else:
                self._admission.open = True
        return await asyncio.to_thread(self._facts)

    def _facts(self) -> HostFacts:
        settings = self._settings
        disk = shutil.disk_usage(settings.data_dir)
        builds = [
            HostBuild(build_id=entry.build_id, template_id=entry.template_id, since=entry.taken_at)
            for entry in self._ledger.entries()
        ]
        return HostFacts(
            host=settings.host,
            draining=is_draining(self._data_dir),
            lacks=self._admission.lacking,
            slots=settings.host_slots,
            builds=tuple(builds),
            disk_free_bytes=disk.free,
            disk_total_bytes=disk.total,
            checkpoint_bytes=sum(kept.bytes for kept in self._store.all()),
            kernel_versions=_versions(settings.kernels_dir, "vmlinux.bin"),
            firecracker_versions=_versions(settings.firecracker_dir, "firecracker"),
            leads_out=not missing_for_egress(),
            version=importlib.metadata.version("template-manager"),
            machine=tell_machine(),
            has_agent=settings.guest_agent_path is not None and settings.guest_agent_path.exists(),
        )


def is_draining(data_dir: DataDir) -> bool:
    """Whether the host takes no new builds; it stays so over a restart."""
    return data_dir.draining_mark.exists()


def set_draining(data_dir: DataDir, draining: bool) -> None:
    """Let the host take no new builds any more, or again."""
    if draining:
        data_dir.draining_mark.touch()
    else:
        data_dir.draining_mark.unlink(missing_ok=True)


def _versions(directory: Path, name: str) -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in directory.glob(f"*/{name}")))
